"""FFHQ: an LMDB as the DDIM authors read it (keys 256-00000 ... and `length`), or a folder or .zip of its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from utils.data.encoded_set import EncodedSet
from utils.data.image_folder import open_images
from utils.data.image_set import ImageSet
from utils.data.sources import Lmdb, Source
from utils.errors import InputError

SPLIT_SEED = 2019  # of the authors' shuffle, after which nine tenths are for training


def load_ffhq(options) -> dict[str, ImageSet]:
    """{"train": nine tenths, "test": one tenth}, which images the DDIM authors' code decides."""
    source = _open(Path(options.root), options.image_size)
    order = np.arange(len(source))
    np.random.RandomState(SPLIT_SEED).shuffle(order)
    n_train = int(len(source) * 0.9)
    if not n_train:
        raise InputError(f"{options.root} holds too few images to split them")
    parts = {"train": order[:n_train], "test": order[n_train:]}
    return {
        split: EncodedSet("ffhq", source, options.image_size, options.channels, torch.from_numpy(np.sort(ids)))
        for split, ids in parts.items()
    }


def _open(root: Path, size: int) -> Source:
    lmdb = next((place for place in (root, root / "FFHQ") if (place / "data.mdb").is_file()), None)
    if lmdb is None:
        return open_images(root)[0]
    length = Lmdb(lmdb, [b"length"]).get(b"length")
    if length is None or not length.isdigit():
        raise InputError(f"LMDB {lmdb} has no number under the key `length`: wanted one made for FFHQ")
    source = Lmdb(lmdb, [f"{size}-{i:05d}".encode() for i in range(int(length))])
    source.read(0)  # an LMDB of another resolution says so now
    return source
