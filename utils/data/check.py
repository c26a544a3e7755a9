"""`python -m utils.data check`: walk a data set as training would read it; count, find what is broken, show some."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.data import load_splits
from utils.data.decode import image_header
from utils.data.image_set import ImageSet
from utils.errors import InputError
from utils.images import enlarge, grid, write_png

N_SHOWN = 64
N_NAMED = 10  # broken files that are named; the rest is counted


class _Walk(Dataset):
    """(image or None, the stored width and height or None, what is wrong or None) of image i."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor | None, tuple[int, int] | None, str | None]:
        try:
            image, source = self.images[i], getattr(self.images, "source", None)
            if source is None:
                return image, None, None
            i = int(self.images.ids[i])
            return image, image_header(source.read(i), source.name(i))[0], None
        except InputError as error:
            return None, None, str(error)


def check(data: DictConfig, sheet: Path) -> int:
    """Print what the data set of a config's data section holds; write a contact sheet. Returns 1 if one is broken."""
    broken, shown = 0, []
    for split, images in load_splits(data).items():
        found = _walk(images, data.num_workers)
        broken += len(found["broken"])
        shown += found["shown"][: N_SHOWN // (2 if split == "test" else 1)]
        print(f"{images.name}: {len(images):,} images, {images.n_bytes() / 2**20:,.1f} MiB decoded", end="")
        print(f" at {data.channels} x {data.image_size}^2; {found['rate']:,.0f} images/s, {data.num_workers} workers")
        if images.labels is not None:
            counts = images.labels.bincount(minlength=len(images.classes)).tolist()
            named = [f"{name} {n:,}" for name, n in zip(images.classes, counts)]
            print(f"  classes     {', '.join(named[:20])}{f', ... ({len(named)})' if len(named) > 20 else ''}")
        if found["sizes"]:
            common = [f"{w}x{h} ({n:,})" for (w, h), n in found["sizes"].most_common(5)]
            smaller = sum(n for (w, h), n in found["sizes"].items() if min(w, h) < data.image_size)
            print(f"  stored as   {', '.join(common)}{', ...' if len(found['sizes']) > 5 else ''}")
            print(f"  enlarged    {smaller:,} have a side below {data.image_size} pixels") if smaller else None
        if found["n"]:
            mean, spread = found["mean"], found["spread"]
            print(f"  levels      {mean:.1f} ± {spread:.1f} of 0 to 255")
        for line in found["broken"][:N_NAMED]:
            print(f"  BROKEN      {line}")
        if len(found["broken"]) > N_NAMED:
            print(f"  BROKEN      ... {len(found['broken']):,} in all")
    if shown:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write_png(sheet, enlarge(grid(shown[:N_SHOWN])))
        print(f"contact sheet: {sheet.resolve()}")
    print(f"{broken:,} broken" if broken else "every image is good")
    return int(broken > 0)


def _walk(images: ImageSet, num_workers: int) -> dict:
    """Every image once; an evenly spaced few are kept to be shown."""
    sizes, broken, shown, n = Counter(), [], [], 0
    total, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    kept = {i * len(images) // N_SHOWN for i in range(N_SHOWN)}
    workers = num_workers if hasattr(images, "source") else 0
    loader = DataLoader(_Walk(images), 64, num_workers=workers, collate_fn=list)
    began, position = time.monotonic(), 0
    with tqdm(total=len(images), desc=images.name, unit="img", file=sys.stderr, disable=None) as bar:
        for batch in loader:
            for image, size, wrong in batch:
                if wrong is not None:
                    broken.append(wrong)
                else:
                    sizes[size] += size is not None
                    levels, n = image.double() / 255, n + 1
                    total, squares = total + levels.mean(), squares + levels.square().mean()
                    if position in kept:
                        shown.append(image)
                position += 1
            bar.update(len(batch))
    mean = total / max(n, 1)
    return {
        "n": n,
        "sizes": +sizes,
        "broken": broken,
        "shown": shown,
        "rate": len(images) / max(time.monotonic() - began, 1e-9),
        "mean": 255 * float(mean),
        "spread": 255 * float((squares / max(n, 1) - mean.square()).clamp(min=0).sqrt()),
    }
