"""A folder of images, nested or flat: PNG, JPEG or WebP, any mode and size. The first folder level is the class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.image_set import ImageSet, fit, to_channels
from utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content; others would start programs, as PostScript does
MAX_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
ERRORS = (OSError, SyntaxError, ValueError, AssertionError, Image.DecompressionBombError)


def read_image(path: Path | str, channels: int) -> Tensor:
    """An image file -> uint8 [channels, H, W].

    The file's orientation tag is ignored, transparency is laid over white, 16-bit gray is scaled to 8 bits.

    Raises:
        InputError: the file can't be decoded, or declares more than MAX_PIXELS; it is named.
    """
    try:
        with _open(path) as image:
            if image.mode in ("I;16", "I;16B", "I"):
                levels = np.asarray(image, dtype=np.int64) * 255 / 65535
                image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB" if image.mode not in ("L", "1") else "L")
            pixels = torch.from_numpy(np.array(image))
    except ERRORS as error:
        raise InputError(f"image {path} can't be read: {error}") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return to_channels(pixels, channels)


def _open(path: Path | str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"image {path} declares {image.width}x{image.height} pixels: refused")
    return image


def image_header(path: Path) -> tuple[tuple[int, int], bool]:
    """((width, height), whether it is gray) without decoding the pixels. Raises InputError for no image."""
    try:
        with _open(path) as image:
            return image.size, image.mode in ("1", "L", "I", "I;16", "I;16B")
    except ERRORS as error:
        raise InputError(f"image {path} can't be read: {error}") from None


class FolderSet(ImageSet):
    """Images that are read from their files one at a time, resized and cut to size."""

    def __init__(
        self, name: str, paths: Sequence[Path], labels: Tensor | None, classes: Sequence[str], size: int, channels: int
    ) -> None:
        super().__init__(name, None, labels, classes)
        self.paths, self.size, self.channels = list(paths), size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return fit(read_image(self.paths[i], self.channels), self.size)

    def subset(self, indices: Tensor, name: str) -> FolderSet:
        labels = None if self.labels is None else self.labels[indices]
        paths = [self.paths[i] for i in indices.tolist()]
        return FolderSet(name, paths, labels, self.classes, self.size, self.channels)

    def n_bytes(self) -> int:
        return len(self) * self.channels * self.size**2

    def content_hash(self) -> str:
        """Over the files' bytes and the size they become, without decoding them."""
        digest = hashlib.sha256(f"{self.size} {self.channels}".encode())
        for path in self.paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def find_images(root: Path) -> list[Path]:
    """Every image below `root`, in sorted order. Raises InputError where there is none, or no folder."""
    if not root.is_dir():
        raise InputError(f"image folder {root} does not exist" if not root.exists() else f"{root} is not a folder")
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        found += [Path(folder) / name for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    if not found:
        raise InputError(f"image folder {root} holds no {', '.join(s[1:] for s in SUFFIXES)} file")
    return sorted(found)


def load_folder(root: Path, size: int, channels: int, name: str, classes: Sequence[str] = ()) -> FolderSet:
    """The images below one folder; classes are its first folder level where every image lies in one.

    Given `classes` (those of the training images), labels count in them, and another class is an error.
    """
    paths = find_images(root)
    first = [path.relative_to(root).parts[0] if path.parent != root else None for path in paths]
    if None in first or len(set(first) | set(classes)) < 2:
        return FolderSet(name, paths, None, [], size, channels)
    classes = list(classes) or sorted(set(first))
    if unknown := set(first) - set(classes):
        raise InputError(f"image folder {root}: the class {min(unknown)} has no training images")
    labels = torch.tensor([classes.index(part) for part in first])
    return FolderSet(name, paths, labels, classes, size, channels)


def load_image_folder(options) -> dict[str, ImageSet]:
    """{"train": ...}, and "test" where data.root holds just a train and a test (or val, valid, validation) folder."""
    root = Path(options.root)
    children = sorted(child.name for child in root.iterdir() if child.is_dir()) if root.is_dir() else []
    if len(children) > 2 and "train" in children and all(child in SPLITS for child in children):
        raise InputError(
            f"data.root {root} holds the splits {', '.join(children)}: keep train and one other, or name one of them"
        )
    if len(children) == 2 and "train" in children and all(child in SPLITS for child in children):
        folders = {SPLITS[child]: root / child for child in children}
    else:
        folders = {"train": root}
    size, channels, name = options.image_size, options.channels, root.resolve().name
    sets = {"train": load_folder(folders["train"], size, channels, name)}
    if "test" in folders:
        sets["test"] = load_folder(folders["test"], size, channels, name, sets["train"].classes)
    return sets


def load_as_is(path: str, option: str) -> ImageSet:
    """The images below a folder, neither resized nor cut: gray where every file is, else RGB.

    option: the command line's name of the folder, for errors.

    Raises:
        InputError: no folder, no image, an unreadable one, or sizes that differ or are not square.
    """
    paths = find_images(Path(path))
    headers = [(image, *image_header(image)) for image in paths]
    first, (width, height), _ = headers[0]
    for image, size, _ in headers:
        if size != (width, height):
            raise InputError(
                f"{option} {path}: sizes differ: {first.name} is {width}x{height}, {image.name} {size[0]}x{size[1]}"
            )
    if width != height:
        raise InputError(f"{option} {path}: {first.name} is {width}x{height} pixels: not square")
    channels = 1 if all(is_gray for *_, is_gray in headers) else 3
    return load_folder(Path(path), width, channels, Path(path).resolve().name)
