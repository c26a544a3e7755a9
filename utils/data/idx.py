"""MNIST and Fashion-MNIST: four IDX files, gzipped or not, found in an existing folder or downloaded by torchvision."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.data.image_set import ImageSet, fit_all
from utils.errors import InputError

FILES = {"train": "train", "test": "t10k"}
CLASSES = {
    "MNIST": [str(digit) for digit in range(10)],
    "FashionMNIST": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
}
DEBIAN = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}  # package dataset-fashion-mnist


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """The uint8 array of n_dims dimensions in an IDX file (http://yann.lecun.com/exdb/mnist), gzipped or not.

    No more is read, or inflated, than the header declares.

    Raises:
        InputError: the file is damaged, or holds an array of another kind.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * n_dims)
            whole = header[:4] == bytes([0, 0, 8, n_dims]) and len(header) == 4 + 4 * n_dims
            shape = struct.unpack(f">{n_dims}I", header[4:]) if whole else (0,)
            size, data = math.prod(shape), bytearray()
            while len(data) <= size and (chunk := file.read(min(1 << 20, size + 1 - len(data)))):
                data += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if not size or len(data) != size:
        raise InputError(f"{path} is damaged: not a whole IDX file of bytes in {n_dims} dimensions")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, split: str, kind: str) -> Path | None:
    stem = f"{FILES[split]}-{kind}-ubyte"
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _folder(torchvision_name: str, options) -> Path:
    """The folder that holds all four files, after a download if need be."""
    root = Path(options.root)
    candidates = [root, root / torchvision_name / "raw"] + [DEBIAN[n] for n in DEBIAN if n == torchvision_name]
    kinds = [(split, kind) for split in FILES for kind in ("images-idx3", "labels-idx1")]
    for folder in candidates:
        if all(_find(folder, *pair) for pair in kinds):
            return folder
    hint = " (or: apt-get install dataset-fashion-mnist)" if torchvision_name in DEBIAN else ""
    missing = f"the four IDX files of {torchvision_name} are not in {root} or {root / torchvision_name / 'raw'}{hint}"
    if not options.download:
        raise InputError(f"{missing}, and data.download is false")
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, torchvision_name)(str(root), download=True)
    except Exception as error:  # torchvision raises what its many mirrors raise
        raise InputError(f"{missing}, and the download failed: {error}") from None
    return root / torchvision_name / "raw"


def load_idx(torchvision_name: str, options) -> dict[str, ImageSet]:
    """{"train": 60,000 images, "test": 10,000}. 28 pixels become 32 by a black border of 2, other sizes by resizing."""
    folder, sets = _folder(torchvision_name, options), {}
    for split in FILES:
        images = torch.from_numpy(read_idx(_find(folder, split, "images-idx3"), 3))[:, None]
        labels = torch.from_numpy(read_idx(_find(folder, split, "labels-idx1"), 1)).long()
        if len(images) != len(labels):
            raise InputError(f"{folder}: {len(images)} images but {len(labels)} labels in the {split} files")
        if options.image_size == 32:
            images = F.pad(images, (2, 2, 2, 2))
        images = fit_all(images, options.image_size, options.channels)
        sets[split] = ImageSet(options.name, images, labels, CLASSES[torchvision_name])
    return sets
