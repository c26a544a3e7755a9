"""Checkpoints of other projects, read safely: their weights under our names, and what they say of the network.

No pickle is ever executed: .pth, .pt, .ckpt and .bin files load with weights_only. What the files do not say about the
network and its diffusion is assumed, told, and can be overridden.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models import pretrained
from models.pretrained import Architecture
from utils import ddim_format, diffusers_format
from utils.checkpoint import read_weights
from utils.config import merge
from utils.errors import InputError

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # of a diffusers model
ATTENTION_SIZE = 16  # at which the DDPM paper's networks attend [pixels]
ASSUMED = {  # what the DDPM paper's networks have in common and their tensors do not say
    "model.n_heads": 1,
    "model.norm_groups": 32,
    "diffusion.total_steps": 1000,
    "diffusion.beta_schedule": "linear",
    "diffusion.beta_start": 1e-4,
    "diffusion.beta_end": 0.02,
    "diffusion.objective": "pred_eps",
}


@dataclass
class Foreign:
    """A checkpoint of another project."""

    file: Path  # that holds the weights
    sets: dict[str, dict[str, Tensor]]  # "EMA" and "raw", or "only" -> weights under our names, float32
    known: dict[str, Any]  # dotted config keys that the files say
    assumed: dict[str, Any] = field(default_factory=dict)  # and those that they do not
    notes: list[str] = field(default_factory=list)

    def keys(self) -> dict[str, Any]:
        """All of them; what it was trained on is not claimed."""
        return {"data.name": "image_folder", **self.assumed, **self.known}


def is_folder(place: Path) -> bool:
    """Whether a folder looks like one of diffusers: a pipeline, or its U-Net alone."""
    return any((place / name).exists() for name in ("model_index.json", "unet", "config.json", *FILES))


def read(place: Path, asked: dict[str, Any]) -> Foreign:
    """A diffusers folder, or a weights file of any known layout.

    asked: {dotted key: typed value} given for this call: a size of the images, or one at which there is attention,
    decides the other where the files say neither.

    Raises:
        InputError: something else; it says what was found and what to do.
    """
    file = weights_file(place) if place.is_dir() else place
    loaded = load(file)
    sets = state_dicts(loaded, file)
    foreign_names = pretrained.has_diffusers_names(next(iter(sets.values())))
    try:
        sets = {kind: pretrained.ours(state) for kind, state in sets.items()}
        found = {kind: pretrained.architecture(state) for kind, state in sets.items()}
    except ValueError as error:
        raise InputError(f"--weights {file} can't be used: {error}") from None
    if len(set(map(str, found.values()))) > 1:
        raise InputError(f"--weights {file} can't be used: its raw and its EMA weights are of different networks")
    foreign = Foreign(file, sets, {})
    dtypes = {str(value.dtype).removeprefix("torch.") for state in sets.values() for value in state.values()}
    if dtypes != {"float32"}:
        foreign.notes.append(f"its weights are {' and '.join(sorted(dtypes))}: read as float32")
        foreign.sets = {kind: {n: value.float() for n, value in state.items()} for kind, state in sets.items()}
    levels = None
    if isinstance(loaded, list) and (file.parent / "config.yml").is_file():
        foreign.known |= ddim_format.config_keys(file.parent / "config.yml")
    elif (options := _json(file.parent / "config.json", must=foreign_names)) is not None:
        keys, levels = _parsed(diffusers_format.unet_keys, options, file.parent / "config.json")
        foreign.known |= keys
        _add_scheduler(foreign)
    foreign.known = _typed(foreign.known, f"what lies beside {file}")
    _add_architecture(foreign, found.popitem()[1], levels, asked)
    foreign.assumed |= {name: value for name, value in ASSUMED.items() if name not in foreign.known}
    return foreign


def weights_file(folder: Path) -> Path:
    """The weights of a diffusers folder: a pipeline's or of its U-Net alone, .safetensors before .bin."""
    index = _json(folder / "model_index.json", must=True) or {}
    more = sorted(name for name in index if name in ("vae", "vqvae", "text_encoder", "tokenizer"))
    if more:
        raise InputError(f"--weights {folder} holds a {index.get('_class_name')} with {', '.join(more)}: not DDPM's")
    for place in (folder / "unet", folder):
        for name in FILES:
            if (place / name).is_file():
                return place / name
        if (place / f"{FILES[0]}.index.json").exists() or (place / f"{FILES[1]}.index.json").exists():
            raise InputError(f"--weights {place} holds weights in several shards: save them as one file")
    raise InputError(f"--weights {folder} looks like a diffusers folder, but holds neither {' nor '.join(FILES)}")


def load(file: Path) -> Any:
    """What is in a weights file: tensors, or containers of them. Raises InputError for anything else."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise InputError(f"--weights {file} can't be read: {error.strerror}") from None
    if not head:
        raise InputError(f"--weights {file} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"--weights {file} is only git-lfs's pointer to the file: fetch it with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"--weights {file} is a web page, not weights: download the file itself")
    if file.suffix == ".safetensors":
        return read_weights(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write
            return torch.load(file, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK\x03\x04"))
    except Exception as error:  # torch has no common type for what a damaged or hostile file can do
        unsafe = isinstance(error, pickle.UnpicklingError) and head.startswith((b"PK\x03\x04", b"\x80"))
        called = re.search(r"GLOBAL (\S+)", str(error))
    if unsafe:
        what = f"calls {called[1]}" if called else "holds more than tensors"
        raise InputError(
            f"--weights {file} is a pickle that {what}: refused, nothing of it was executed; wanted a state dict"
        )
    raise InputError(f"--weights {file} can't be read: damaged, half a download, or not written by torch.save")


def state_dicts(loaded: Any, file: Path) -> dict[str, dict[str, Tensor]]:
    """{"raw": ..., "EMA": ...} or {"only": ...}: the state dicts in what a file held, names untouched."""
    if isinstance(loaded, (list, tuple)):
        found = ddim_format.sets(loaded)
        what = f"a list of {len(loaded)}: {', '.join(type(entry).__name__ for entry in loaded[:6])}"
        wanted = "the DDIM authors' list has the model's state, the optimizer's, epoch, step, and the EMA's state"
    else:
        found = {"only": loaded} if isinstance(loaded, dict) else None
        names = list(map(str, loaded))[:4] if isinstance(loaded, dict) else []
        what = f"a dict of {', '.join(names)}, ..." if names else f"a {type(loaded).__name__} without tensors"
        wanted = "wanted a plain state dict, name to tensor"
    flat = [item for state in (found or {}).values() for item in state.items()]
    if not flat or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in flat):
        raise InputError(f"--weights {file} has an unknown layout: it holds {what}; {wanted}")
    return found


def _add_scheduler(foreign: Foreign) -> None:
    folder = foreign.file.parent
    home = folder.parent if folder.name == "unet" else folder
    for path in (folder / "scheduler_config.json", home / "scheduler" / "scheduler_config.json"):
        if (options := _json(path, must=True)) is not None:
            keys, notes = _parsed(diffusers_format.scheduler_keys, options, path)
            foreign.known |= keys
            foreign.notes += [f"{path.name}: {note} has no counterpart here and is left out" for note in notes]
            return


def _typed(keys: dict[str, Any], where: str) -> dict[str, Any]:
    """Values as the configuration takes them. Raises InputError for one that it does not."""
    config = merge((where, keys))
    return {name: _plain(OmegaConf.select(config, name)) for name in keys}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _add_architecture(foreign: Foreign, found: Architecture, levels: list[int] | None, asked: dict[str, Any]) -> None:
    """Put what the tensors say beside what the files said, which must agree; the image size may have to be assumed."""
    said = foreign.known
    if levels is not None and levels != found.attn_levels:
        raise InputError(
            f"--weights {foreign.file} has attention at the levels {found.attn_levels}, "
            f"but the config beside it says {levels}"
        )
    if "data.image_size" not in said:
        foreign.assumed["data.image_size"] = _image_size(foreign.file, found.attn_levels, asked)
    size = said.get("data.image_size") or foreign.assumed["data.image_size"]
    sizes = [size >> level for level in range(len(found.dim_mults))]
    if "model.attn_resolutions" in said:  # theirs may list sizes that never occur
        said["model.attn_resolutions"] = [value for value in sizes if value in said["model.attn_resolutions"]]
    tensors = {
        "data.channels": found.channels,
        "model.dim": found.dim,
        "model.dim_mults": found.dim_mults,
        "model.attn_resolutions": [sizes[level] for level in found.attn_levels],
        "model.num_res_blocks": found.num_res_blocks,
        "diffusion.learn_variance": found.learn_variance,
    }
    for name, value in tensors.items():
        if said.get(name, value) != value:
            raise InputError(
                f"--weights {foreign.file} has {name} = {value}, but the config beside it says {said[name]}"
            )
    foreign.known = said | tensors


def _image_size(file: Path, attn_levels: list[int], asked: dict[str, Any]) -> int:
    if "data.image_size" in asked:
        return asked["data.image_size"]
    if not attn_levels:
        raise InputError(
            f"--weights {file} does not say the size of its images, and has no attention to tell it by: "
            "give --data.image_size"
        )
    return max(asked.get("model.attn_resolutions") or [ATTENTION_SIZE]) << attn_levels[0]


def _json(path: Path, must: bool = False) -> dict[str, Any] | None:
    """A JSON file's object; None where there is none, or where it is not of diffusers and need not be (`must`)."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} can't be read: wanted an object of options")
    return found if "_class_name" in found or must else None


def _parsed(parse: Callable, options: dict[str, Any], path: Path) -> Any:
    try:
        return parse(options)
    except ValueError as error:
        raise InputError(f"{path} can't be used: {error}") from None
    except (TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} can't be used: an option has a value of the wrong type ({error})") from None
