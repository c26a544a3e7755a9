"""`--source` and `--mask`: real images to reconstruct, to interpolate between or to fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from utils.config import KEYS
from utils.data.decode import read_image
from utils.data.image_folder import load_as_is
from utils.data.image_set import ImageSet
from utils.errors import InputError
from utils.reference import open_reference

MASKS = ("left", "right", "top", "bottom", "center")


def load_source(text: str, data: DictConfig, asked: dict[str, Any], n: int) -> ImageSet:
    """`--source DIR|NAME[:SPLIT]`, of a data set its test split where there is one.

    data: the checkpoint's data section. asked: data.* keys of the command line, which hold for another data set.

    Raises:
        InputError: no such source, fewer than n images, or a folder's images have another size or channels.
    """
    if Path(text).is_dir() and text not in KEYS["data.name"].choices:
        found = load_as_is(text, "--source")
        has, wants = (found.channels, found.size), (data.channels, data.image_size)
        if has != wants:
            raise InputError(f"--source {text}: its images are {_shape(*has)}, the network's {_shape(*wants)}")
    else:
        reference = open_reference(text, data, asked, data.image_size, data.channels, "--source")
        found = reference.test if ":" not in text and reference.test is not None else reference.images
    if n > len(found):
        more = " (NAME:all has more)" if ":" in found.name and not found.name.endswith(":all") else ""
        raise InputError(f"--n_samples {n}: --source {found.name} has {len(found)} images{more}")
    for i in range(n):  # an unreadable one is told now, not after hours
        found[i]
    return found


def load_mask(text: str, image_size: int) -> Tensor:
    """[H, W] bool, true where `--mask FILE|SIDE` is white (or transparent): the part to fill in.

    Raises:
        InputError: neither an image nor a side, another size, all black or all white.
    """
    if text in MASKS:
        hole = torch.zeros(image_size, image_size, dtype=torch.bool)
        half, quarter = image_size // 2, image_size // 4
        first, second, middle = slice(0, half), slice(half, None), slice(quarter, image_size - quarter)
        everywhere = slice(None)
        rows = {"top": first, "bottom": second, "center": middle}.get(text, everywhere)
        columns = {"left": first, "right": second, "center": middle}.get(text, everywhere)
        hole[rows, columns] = True
    elif Path(text).is_file():
        hole = read_image(text, 1)[0] >= 128
    else:
        raise InputError(f"--mask {text}: neither a file nor one of {', '.join(MASKS)}")
    if hole.shape != (image_size, image_size):
        size = f"{hole.shape[1]}x{hole.shape[0]}"
        raise InputError(f"--mask {text} is {size} pixels, the network's images {image_size}x{image_size}")
    if hole.all() or not hole.any():
        raise InputError(
            f"--mask {text} is all {'white: nothing is known' if hole.all() else 'black: nothing to fill'}"
        )
    return hole


def _shape(channels: int, size: int) -> str:
    return f"{size}x{size} {'gray' if channels == 1 else 'RGB'}"
