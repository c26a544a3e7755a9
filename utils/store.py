"""`--store DIR`: generated images and their features on disk, so that a killed evaluation goes on inside a cell.

DIR/IDENTITY/00000000.images.npy holds the images of one chunk of indices, 00000000.EXTRACTOR.safetensors what the
extractor makes of them.
A chunk starts at a multiple of its own size whatever the number of images and of processes, and is generated in one
batch: what rounding makes of it is the same before and after a kill. Every process must see DIR.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoint import write_atomically
from utils.distributed import from_main, share
from utils.errors import InputError, RankError
from utils.fidelity import Extractor, Features

SECONDS = "seconds"  # what a chunk took: metadata of its features


class Store:
    """The images 0..n-1 of one cell on disk, `chunk` to a file, and their features."""

    def __init__(self, root: Path, source: dict, extractor: Extractor, n: int, chunk: int) -> None:
        """source: everything that the pixels of image i depend on (`protocol.sampling_identity`)."""
        identity = json.dumps({"source": source, "chunk": chunk}, sort_keys=True)
        kind = f"{extractor.name} {extractor.weights_sha256} {sorted(extractor.layers.values())}"
        self.folder, self.n, self.chunk, self.extractor = root / _short_hash(identity), n, chunk, extractor
        self.kind = _short_hash(kind)

    def starts(self) -> list[int]:
        return list(range(0, self.n, self.chunk))

    def fill(self, accelerator, generate: Callable[[list[list[int]]], Iterator[Tensor]]) -> None:
        """Make what is missing, split over the processes. A collective.

        generate(chunks) yields the uint8 images [b, C, H, W] of each list of indices.

        Raises:
            InputError, RankError: the folder can't be written.
        """
        wrong = None
        if accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for leftover in self.folder.glob(".*.tmp"):  # half-written by a killed process
                    leftover.unlink()
            except OSError as error:
                wrong = f"--store {self.folder.parent} can't be written: {error.strerror}"
        todo = None
        if accelerator.is_main_process and not wrong:
            todo = [start for start in self.starts() if self._features(start) is None]
        wrong, todo = from_main(accelerator, (wrong, todo))
        if wrong:
            raise InputError(wrong)
        mine = [todo[i] for i in share(len(todo), accelerator.process_index, accelerator.num_processes)]
        kept = {start: self._images(start) is not None for start in mine}
        new = generate([self._indices(start) for start in mine if not kept[start]])
        for start in mine:
            began = time.monotonic()
            images = self._images(start) if kept[start] else next(new)
            if not kept[start]:
                self._write(self._path(start, "images.npy"), partial(_save, images=images))
            features = self.extractor([images])
            took = {SECONDS: f"{time.monotonic() - began:.6f}"}
            self._write(self._path(start, f"{self.kind}.safetensors"), partial(save_file, features, metadata=took))
        accelerator.wait_for_everyone()

    def features(self) -> tuple[Features, float]:
        """(those of all images, in order; seconds that it took one process to make them)."""
        found = [self._features(start) for start in self.starts()]
        layers = found[0][0]
        return {layer: torch.cat([part[layer] for part, _ in found]) for layer in layers}, sum(s for _, s in found)

    def _indices(self, start: int) -> list[int]:
        return list(range(start, min(start + self.chunk, self.n)))

    def _path(self, start: int, end: str) -> Path:
        return self.folder / f"{start:08d}.{end}"

    def _images(self, start: int) -> Tensor | None:
        """uint8 [b, C, H, W]; None where the file is not there, damaged, or of fewer or more images."""
        try:
            images = torch.from_numpy(np.load(self._path(start, "images.npy"), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        return images if images.dtype == torch.uint8 and len(images) == len(self._indices(start)) else None

    def _features(self, start: int) -> tuple[Features, float] | None:
        try:
            with safe_open(self._path(start, f"{self.kind}.safetensors"), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                seconds = float(file.metadata()[SECONDS])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        whole = found and all(len(rows) == len(self._indices(start)) for rows in found.values())
        return (found, seconds) if whole else None

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write_atomically(path, write)
        except (OSError, SafetensorError) as error:
            raise RankError(f"--store {self.folder.parent} can't be written: {error}") from None


def _save(place: Path, images: Tensor) -> None:
    with open(place, "wb") as file:  # given a name, numpy would add its suffix
        np.save(file, images.numpy())


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
