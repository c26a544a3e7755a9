"""Pictures on disk: single PNGs written by threads, strips, and grids."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_png
from torchvision.utils import make_grid


def grid(images: Tensor | list[Tensor], n_columns: int | None = None, padding: int = 2) -> Tensor:
    """uint8 [N, C, H, W] (or a list of such images) -> one uint8 picture [C, H', W'], near square without n_columns."""
    images = torch.stack(images) if isinstance(images, list) else images
    n_columns = n_columns or max(1, round(len(images) ** 0.5))
    picture = make_grid(images, nrow=n_columns, padding=padding, pad_value=255)
    return picture[:1] if images.shape[1] == 1 else picture  # make_grid turns gray into RGB


def strip(frames: Tensor) -> Tensor:
    """uint8 [F, C, H, W] -> [C, H, F * W], side by side without gaps."""
    return torch.cat(list(frames), dim=-1)


def upright(frames: Tensor) -> Tensor:
    """uint8 [F, C, H, W] -> [C, F * H, W], one below the other without gaps."""
    return torch.cat(list(frames), dim=-2)


def enlarge(picture: Tensor, at_least: int = 512) -> Tensor:
    """Repeat pixels of a small picture [C, H, W] until its longer side has `at_least` of them."""
    factor = max(1, -(-at_least // max(picture.shape[-2:])))
    return picture.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def write_png(path: Path, picture: Tensor) -> None:
    """uint8 [C, H, W], C of 1 or 3, published by a rename so that a PNG that exists is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(encode_png(picture.contiguous(), compression_level=6).numpy().tobytes())
    os.replace(temporary, path)


def read_png(path: Path) -> Tensor:
    """uint8 [C, H, W] as stored."""
    return decode_image(str(path), mode=ImageReadMode.UNCHANGED)


class PngWriter:
    """Writes PNGs in threads, off the critical path; errors surface at `close`, or once WAITING writes are waiting."""

    WAITING = 1024  # bounds the memory of what waits

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 0.0  # what callers waited
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self.pending: deque[Future] = deque()

    def write(self, index: int, picture: Tensor) -> None:
        start = time.perf_counter()
        if len(self.pending) == self.WAITING:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(write_png, self.folder / file_name(index), picture))
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        start = time.perf_counter()
        self.pool.shutdown(wait=True)
        self.seconds += time.perf_counter() - start
        for future in self.pending:
            future.result()


def file_name(index: int) -> str:
    return f"{index:06d}.png"
