"""A folder or a zip archive of images, nested or flat, any mode and size. The first folder level is the class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from utils.data.decode import SUFFIXES, image_header
from utils.data.encoded_set import EncodedSet
from utils.data.image_set import ImageSet
from utils.data.metadata import texts_of
from utils.data.sources import Files, Source, Zip
from utils.errors import InputError

SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
Place = tuple[str, ...]  # of an image: its folders


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


def open_images(root: Path) -> tuple[Source, list[Place]]:
    """The images below a folder or in a zip archive, and the folders in which each lies."""
    if root.is_file() and root.suffix.lower() == ".zip":
        source = Zip(root)
        places = [PurePosixPath(member).parts[:-1] for member in source.members]
        while places[0] and len({place[:1] for place in places}) == 1 and places[0][0] not in SPLITS:
            places = [place[1:] for place in places]  # archives are often packed with the folder that held all
        return source, places
    paths = find_images(root)
    return Files(paths), [path.relative_to(root).parts[:-1] for path in paths]


def labelled(
    source: Source, places: Sequence[Place], ids: Sequence[int], size: int, channels: int, name: str, where: str,
    classes: Sequence[str] = (), texts: Sequence[str | None] | None = None,
) -> EncodedSet:  # fmt: skip
    """The images `ids`; classes are the first folders of their places where every image lies in one.

    Given `classes` (those of the training images), labels count in them, and another class is an error.
    """
    first = [place[0] if place else None for place in places]
    captions = None if texts is None else [texts[i] for i in ids]
    if None in first or len(set(first) | set(classes)) < 2:
        return EncodedSet(name, source, size, channels, torch.tensor(ids), captions=captions)
    classes = list(classes) or sorted(set(first))
    if unknown := set(first) - set(classes):
        raise InputError(f"{where}: the class {min(unknown)} has no training images")
    labels = torch.tensor([classes.index(part) for part in first])
    return EncodedSet(name, source, size, channels, torch.tensor(ids), labels, classes, captions=captions)


def load_folder(root: Path, size: int, channels: int, name: str) -> EncodedSet:
    """All images below one folder."""
    source, places = open_images(root)
    where, texts = f"image folder {root}", texts_of(root, source)
    return labelled(source, places, range(len(source)), size, channels, name, where, texts=texts)


def load_image_folder(options) -> dict[str, ImageSet]:
    """{"train": ...}, and "test" where data.root holds just a train and a test (or val, valid, validation) folder."""
    root = Path(options.root)
    source, places = open_images(root)
    size, channels, name = options.image_size, options.channels, root.resolve().stem
    texts = texts_of(root, source)
    children = sorted({place[0] for place in places if place})
    if "train" not in children or len(children) < 2 or not all(child in SPLITS for child in children):
        where = f"image folder {root}"
        return {"train": labelled(source, places, range(len(source)), size, channels, name, where, texts=texts)}
    if len(children) > 2 or () in places:
        held = [*children, "loose images"] if () in places else children
        raise InputError(
            f"data.root {root} holds the splits {', '.join(held)}: keep train and one other, or name one of them"
        )
    sets: dict[str, ImageSet] = {}
    for child in sorted(children, key=lambda child: child != "train"):
        ids = [i for i, place in enumerate(places) if place[0] == child]
        inside, classes = [places[i][1:] for i in ids], sets["train"].classes if sets else ()
        where = f"image folder {root / child}"
        sets[SPLITS[child]] = labelled(source, inside, ids, size, channels, name, where, classes, texts)
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
