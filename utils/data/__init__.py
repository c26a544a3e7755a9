"""Data sets by name, their splits, and the batches of a training run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from diffusions.noise import permutation
from utils.data.celeba import load_celeba
from utils.data.cifar10 import load_cifar10
from utils.data.digits import load_digits
from utils.data.ffhq import load_ffhq
from utils.data.huggingface import load_huggingface
from utils.data.idx import load_idx
from utils.data.image_folder import load_image_folder
from utils.data.image_set import ImageSet
from utils.data.lsun import load_lsun
from utils.errors import InputError

# name -> loader of {"train": ImageSet, maybe "test": ImageSet} from the config's data section
DATASETS: dict[str, Callable[..., dict[str, ImageSet]]] = {
    "digits": load_digits,
    "mnist": partial(load_idx, "MNIST"),
    "fashion_mnist": partial(load_idx, "FashionMNIST"),
    "cifar10": load_cifar10,
    "celeba": load_celeba,
    "lsun_bedroom": partial(load_lsun, "bedroom"),
    "lsun_church": partial(load_lsun, "church_outdoor"),
    "lsun_cat": partial(load_lsun, "cat"),
    "ffhq": load_ffhq,
    "image_folder": load_image_folder,
    "huggingface": load_huggingface,
}
SPLITS = ("train", "test", "all")
# torch advises, once per loader, no more workers than cores; recipes ask for what a large machine needs.
warnings.filterwarnings("ignore", message="This DataLoader will create")
_SPLIT_SEED = 0x5011D  # the held-out images are a property of the data set, the same for every training seed


def load_splits(options) -> dict[str, ImageSet]:
    """{"train": ..., "test": ...} of the data set that `options` (the config's data section) describes.

    With valid_fraction > 0 the test split is that share of the training images, taken out of them; with 0 it is the
    set's own, and missing where there is none.
    """
    sets = DATASETS[options.name](options)
    if options.valid_fraction > 0:
        whole = sets["train"]
        order = permutation(_SPLIT_SEED, len(whole), 0)
        n_held_out = max(1, round(options.valid_fraction * len(whole)))
        if n_held_out >= len(whole):
            raise InputError(f"data.valid_fraction = {options.valid_fraction:g} leaves no training image")
        sets["test"] = whole.subset(order[:n_held_out].sort().values, whole.name)
        sets["train"] = whole.subset(order[n_held_out:].sort().values, whole.name)
    for split, found in sets.items():
        found.name = f"{found.name}:{split}"
    return sets


def join(sets: dict[str, ImageSet], split: str) -> ImageSet:
    """One split: "train", "test", or "all" of them together (decoded)."""
    if split != "all":
        if split not in sets:
            raise InputError(
                f"{sets['train'].name.split(':')[0]} has no {split} split; set data.valid_fraction above 0"
            )
        return sets[split]
    parts = list(sets.values())
    images = torch.cat([torch.stack([part[i] for i in range(len(part))]) for part in parts])
    labelled = all(part.labels is not None for part in parts)
    labels = torch.cat([part.labels for part in parts]) if labelled else None
    texts = [text for part in parts for text in part.captions or ()]
    captions = texts if len(texts) == len(images) else None
    return ImageSet(parts[0].name.split(":")[0] + ":all", images, labels, parts[0].classes, captions)
