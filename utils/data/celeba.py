"""CelebA as the DDIM authors prepare it: the aligned faces, cut around (89, 121), the official partition."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from utils.data.encoded_set import EncodedSet
from utils.data.image_folder import open_images
from utils.data.image_set import ImageSet, fit_bilinear
from utils.errors import InputError

WIDTH, HEIGHT = 178, 218  # of the aligned images
CENTRE, HALF = (89, 121), 64  # (x, y) and half the side of the square that is cut out [pixels]
PARTITION = "list_eval_partition.txt"
PARTS = {"train": 0, "test": 2}  # 1 is the authors' validation split, which nobody trains on


def cut_face(image: Tensor, size: int) -> Tensor:
    """uint8 [C, 218, 178] -> [C, size, size]: the square of 128 pixels around the face, resized."""
    if tuple(image.shape[-2:]) != (HEIGHT, WIDTH):
        raise InputError(
            f"CelebA's aligned images are {WIDTH}x{HEIGHT} pixels, this one {image.shape[-1]}x{image.shape[-2]}: "
            "for others use data.name = image_folder"
        )
    x, y = CENTRE
    return fit_bilinear(image[..., y - HALF : y + HALF, x - HALF : x + HALF], size)


def load_celeba(options) -> dict[str, ImageSet]:
    """{"train": 162,770 images, "test": 19,962} from img_align_celeba, a folder or a .zip, and the partition file."""
    root = next((p for p in (Path(options.root), Path(options.root) / "celeba") if (p / PARTITION).is_file()), None)
    images = root and next((p for p in (root / "img_align_celeba", root / "img_align_celeba.zip") if p.exists()), None)
    if images is None:
        raise InputError(
            f"CelebA is not in {options.root}: wanted img_align_celeba/ or img_align_celeba.zip, and {PARTITION} "
            "(mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or torchvision.datasets.CelebA with gdown)"
        )
    source, _ = open_images(images)
    held = {PurePosixPath(source.name(i)).name: i for i in range(len(source))}
    parts = _read_partition(root / PARTITION)
    wanted = [name for name, part in parts.items() if part in PARTS.values()]
    absent = [name for name in wanted if name not in held]
    if absent:
        raise InputError(f"{images} lacks {len(absent):,} of the {len(wanted):,} images of {PARTITION}: {absent[0]}")
    sets = {}
    for split, number in PARTS.items():
        ids = torch.tensor([held[name] for name, part in parts.items() if part == number], dtype=torch.int64)
        if not len(ids):
            raise InputError(f"{root / PARTITION} names no image of the {split} split")
        sets[split] = EncodedSet("celeba", source, options.image_size, options.channels, ids, prepare=cut_face)
    return sets


def _read_partition(path: Path) -> dict[str, int]:
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {name: int(part) for name, part in rows}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: wanted lines of an image's name and 0, 1 or 2 ({error})") from None
