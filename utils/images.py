"""Pictures on disk: single PNGs written by threads, strips, and grids."""

from __future__ import annotations

import io
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def grid(images: Tensor | list[Tensor], n_columns: int | None = None, padding: int = 2) -> Tensor:
    """uint8 [N, C, H, W] (or a list of such images) -> one uint8 picture [C, H', W'], near square without n_columns."""
    images = torch.stack(images) if isinstance(images, list) else images
    if len(images) == 1:
        return images[0]
    n_columns = min(n_columns or max(1, round(len(images) ** 0.5)), len(images))
    n_rows = -(-len(images) // n_columns)
    cells = F.pad(images, (padding, 0, padding, 0, 0, 0, 0, n_rows * n_columns - len(images)), value=255)
    rows = cells.unflatten(0, (n_rows, n_columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(rows, (0, padding, 0, padding), value=255)


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


def encode_png(picture: Tensor, compression_level: int = 6) -> bytes:
    """uint8 [C, H, W], C of 1 or 3. By Pillow, as fast as torchvision, which takes two seconds to import."""
    file, pixels = io.BytesIO(), picture.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if len(picture) == 1 else pixels).save(file, "PNG", compress_level=compression_level)
    return file.getvalue()


def write_png(path: Path, picture: Tensor) -> None:
    """uint8 [C, H, W], C of 1 or 3, published by a rename so that a PNG that exists is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(encode_png(picture))
    os.replace(temporary, path)


def read_png(path: Path) -> Tensor:
    """uint8 [C, H, W] as stored."""
    with Image.open(path) as image:
        pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


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
