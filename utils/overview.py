"""What sample_ddpm.py draws beside the folder when all pictures are there: the grid, the animation, the errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.captioned import captioned_grid
from utils.checkpoint import write_atomically
from utils.images import enlarge, grid, read_png
from utils.pictures import Job


def overview(job: Job, paths: Iterable[Path]) -> Tensor:
    """One picture of the first files: images near square, strips with gaps between frames, short ones several a row."""
    mode, corners = job.options.mode, job.options.corners
    if job.asked.entries:
        return captioned_overview(job, list(paths))
    shown = [read_png(path) for path in list(paths)[: 64 if mode == "sample" else 4 if corners else 16]]
    if mode == "sample" or corners:
        return enlarge(grid(shown))
    per_strip = shown[0].shape[-1] // shown[0].shape[-2]
    frames = [frame for picture in shown for frame in picture.chunk(per_strip, dim=-1)]
    return enlarge(grid(frames, per_strip * max(1, 8 // per_strip)))


def captioned_overview(job: Job, paths: list[Path]) -> Tensor:
    """The same with the conditions beneath the images, or beside the strips; guidance scales beside their rows."""
    options, name = job.options, job.asked.name
    if options.guidance_scales:
        columns = [read_png(path).chunk(len(options.guidance_scales), dim=-2) for path in paths[:16]]
        names = [[""] * len(columns)] * (len(options.guidance_scales) - 1) + [[name(i) for i in range(len(columns))]]
        return captioned_grid(list(zip(*columns)), names, [f"scale {scale:g}" for scale in options.guidance_scales])
    if options.mode == "sample":
        shown = [read_png(path) for path in paths[:64]]
        in_turn = len(job.asked.entries)  # a column each, where that gives a grid of a good shape
        width = in_turn if 5 <= in_turn <= 12 else max(1, round(len(shown) ** 0.5))
        starts = range(0, len(shown), width)
        rows = [shown[i : i + width] for i in starts]
        return captioned_grid(rows, [[name(i + j) for j in range(len(row))] for i, row in zip(starts, rows)])
    if options.corners:
        names = [" | ".join(name(4 * i + j) for j in range(4)) for i in range(len(paths[:4]))]
        return captioned_grid([[enlarge(read_png(path))] for path in paths[:4]], [[text] for text in names])
    strips = [read_png(path) for path in paths[:16]]
    rows = [strip.chunk(strip.shape[-1] // strip.shape[-2], dim=-1) for strip in strips]
    pairs = options.mode == "interpolate"
    titles = [f"{name(2 * i)} to {name(2 * i + 1)}" if pairs else name(i) for i in range(len(rows))]
    return captioned_grid(rows, beside=titles)


def write_animation(path: Path, job: Job, paths: Iterable[Path], milliseconds: int = 120) -> None:
    """The strips of the first 64 files, played: uint8 frames in a GIF or WebP that repeats, resting on the last one."""
    strips = torch.stack([read_png(file) for file in list(paths)[:64]])
    frames = [enlarge(grid(frame)) for frame in strips.chunk(job.n_frames, dim=-1)]
    played = [Image.fromarray(frame.permute(1, 2, 0).squeeze(-1).numpy()) for frame in frames]
    durations = [milliseconds] * (len(played) - 1) + [10 * milliseconds]
    kind = path.suffix[1:].upper()
    settings = {"save_all": True, "append_images": played[1:], "duration": durations, "loop": 0}
    write_atomically(path, lambda place: played[0].save(place, kind, **settings, lossless=True))


def write_errors(path: Path, files: Sequence[Path]) -> float:
    """Mean squared error of each side-by-side file's second image against its first, pixels in [0, 1]; their mean.

    Of the pictures as they are stored: rounding to 256 levels alone gives about 1.3e-6.
    """
    pairs = (read_png(file).double().div(255).chunk(2, dim=-1) for file in files)
    errors = [(real - decoded).square().mean().item() for real, decoded in pairs]
    lines = [f"{file.name},{error:.6e}" for file, error in zip(files, errors)]
    write_atomically(path, lambda place: place.write_text("\n".join(["file,error", *lines]) + "\n"))
    return sum(errors) / len(errors)
