"""Tiny data sets in the real ones' formats: FAKES[data.name](root, monkeypatch) writes one below `root`."""

import hashlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
from test_data import write_mnist
from test_sources import celeba, encoded, in_lmdb, photo
from torchvision.datasets import CIFAR10


def fake_idx(root: Path, monkeypatch) -> None:
    write_mnist(root, zipped=True)


def fake_cifar10(root: Path, monkeypatch) -> None:
    """The pickled batches of the python version; torchvision checks the sums of the real ones."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.RandomState(0)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        batches = [
            [name, write(name, {"data": pixels.randint(0, 255, (2, 3072)).astype(np.uint8), "labels": [0, 1]})]
            for name, _ in getattr(CIFAR10, files)
        ]
        monkeypatch.setattr(CIFAR10, files, batches)
    meta = dict(CIFAR10.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", meta)


def fake_celeba(root: Path, monkeypatch) -> None:
    celeba(root)


def fake_lsun(*folders: str):
    def write(root: Path, monkeypatch) -> None:
        for folder in folders:
            in_lmdb(root / folder, {f"{i:040x}": encoded(photo(i, 341, 256 + i), "WEBP") for i in range(4)})

    return write


def fake_ffhq(root: Path, monkeypatch) -> None:
    values = {f"256-{i:05d}": encoded(photo(i, 256, 256), "JPEG") for i in range(10)}
    in_lmdb(root / "FFHQ", values | {"length": b"10"})


def fake_celebahq(root: Path, monkeypatch) -> None:
    with zipfile.ZipFile(root / "celeba_hq_256.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"celeba_hq_256/{i:05d}.png", encoded(photo(i, 256, 256)))


FAKES = {
    "cifar10": fake_cifar10,
    "mnist": fake_idx,
    "fashion_mnist": fake_idx,
    "celeba": fake_celeba,
    "lsun_bedroom": fake_lsun("bedroom_train_lmdb", "bedroom_val_lmdb"),
    "lsun_church": fake_lsun("church_outdoor_train_lmdb", "church_outdoor_val_lmdb"),
    "lsun_cat": fake_lsun("cat"),
    "ffhq": fake_ffhq,
    "image_folder": fake_celebahq,
}
