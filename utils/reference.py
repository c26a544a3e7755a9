"""What generated images are compared with: a data set by name and split, or a folder; its features are cached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils import config as schema
from utils import reference_file
from utils.checkpoint import write_atomically
from utils.config_key import nearest
from utils.data import SPLITS, join, load_splits
from utils.data.batches import decoded
from utils.data.image_set import ImageSet
from utils.distributed import gather_rows, main_process_first, share
from utils.errors import InputError
from utils.reference_file import StoredReference

if TYPE_CHECKING:
    from utils.fidelity import Extractor, Features  # and torch-fidelity, which takes two seconds to import

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class Reference:
    """The real images: those scores are taken against, and the train and test splits around them."""

    images: ImageSet
    train: ImageSet
    test: ImageSet | None

    @property
    def name(self) -> str:
        return self.images.name


def open_reference(
    text: str,
    own: DictConfig | None,
    asked: dict[str, Any],
    image_size: int,
    channels: int,
    option: str = "--reference",
) -> Reference:
    """`--reference NAME[:SPLIT]` (split train where left out, or test, all) or a folder of images, FOLDER[:SPLIT].

    own: the data section of the checkpoint, which holds for its own data set; another one takes its own recipe's.
    asked: data.* keys given for this evaluation; they hold for any data set.
    option: what errors call it.

    Raises:
        InputError: neither a data set nor a folder, or a split that does not exist.
    """
    name, _, split = text.rpartition(":") if ":" in text else (text, "", "")
    names = [name for name in schema.KEYS["data.name"].choices if name != "image_folder"]
    asked = {key: value for key, value in asked.items() if key.startswith("data.") and key != "data.name"}
    if name.replace("-", "_") in names:
        name = name.replace("-", "_")
        data = own.copy() if own is not None and own.name == name else recipe_data(name, asked)
    elif _holds_images(text) or _holds_images(name):
        place, split = (text, "") if _holds_images(text) else (name, split)
        same = own is not None and own.name == "image_folder" and Path(own.root).resolve() == Path(place).resolve()
        data = own.copy() if same else schema.merge(("command line", asked)).data
        data.name, data.root = "image_folder", place
    else:
        hint = nearest(name, names)
        raise InputError(f"{option} {text}: neither a folder nor one of {', '.join(names)}{hint}")
    if split and split not in SPLITS:
        raise InputError(f"{option} {text}: the splits are {', '.join(SPLITS)}")
    data.image_size, data.channels = image_size, channels
    splits = load_splits(data)
    return Reference(join(splits, split or "train"), splits["train"], splits.get("test"))


def _holds_images(place: str) -> bool:
    return Path(place).is_dir() or place.lower().endswith(".zip")


def recipe_data(name: str, asked: dict[str, Any]) -> DictConfig:
    """The data section of a data set's own recipe, where there is one, with the keys asked for."""
    name = name.replace("-", "_")
    recipe = CONFIGS / f"ddpm_{name}.yaml"
    layers = [(str(recipe), schema.read_yaml(recipe))] if recipe.exists() else []
    data = schema.merge(
        *layers, ("command line", {key: value for key, value in asked.items() if key != "data.name"})
    ).data
    if name in schema.KEYS["data.name"].choices:
        data.name = name
    return data


def open_for(
    accelerator, config: DictConfig, text: str, images: ImageSet | None, asked: dict[str, Any]
) -> Reference | StoredReference:
    """`open_reference` for what is scored: `images`, or else the network of `config`. Downloads once. A collective.

    A FILE.npz of statistics is read in place of images.
    """
    size = images.size if images is not None else config.data.image_size
    channels = images.channels if images is not None else config.data.channels
    if text.lower().endswith(".npz"):
        stored = reference_file.load(Path(text))
        stored.check(config.evaluate, size, channels)
        return stored
    with main_process_first(accelerator):
        return open_reference(text, config.data if images is None else None, asked, size, channels)


def features_of(images: ImageSet, extractor: Extractor, cache_dir: Path, accelerator) -> Features:
    """Features of every image, extracted on all processes, cached under a hash of all that they depend on."""
    identity = (
        f"{images.content_hash()} {extractor.name} {extractor.weights_sha256} {sorted(extractor.layers.values())}"
    )
    path = cache_dir / f"features-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.safetensors"
    found = _read_cache(path, set(extractor.layers.values()), len(images))
    if all_agree(accelerator, found is not None):
        return found
    mine = images.subset(share(len(images), accelerator.process_index, accelerator.num_processes), images.name)
    found = extractor(decoded(mine))
    found = {layer: gather_rows(accelerator, value) for layer, value in found.items()}
    if accelerator.is_main_process:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: save_file(found, p))
    return found


def _read_cache(path: Path, layers: set[str], n: int) -> Features | None:
    """Cached features of n images; None where there is no such readable file, which is then made again."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    return found if found.keys() == layers and all(len(rows) == n for rows in found.values()) else None


def all_agree(accelerator, value: bool) -> bool:
    """True where it is on every process: a cache that only some can see is not used by any. A collective."""
    if accelerator.num_processes == 1:
        return value
    return bool(
        accelerator.reduce(torch.tensor(float(value), device=accelerator.device), "sum") == accelerator.num_processes
    )
