"""Images per second of each kind of data source, on made images, read the way training reads them.

    python benchmarks/data.py [--size 64] [--stored 256] [--images 2000] [--workers 0 1 2] [--out DIR]

Images of `stored` pixels are written as JPEG files, a zip archive, an LMDB and a parquet file; each is read by shuffled
batches at `size` pixels. `cached` is the same set decoded in memory. A training whose own images/s is higher starves.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.data import load_splits  # noqa: E402
from utils.data.batches import Batches  # noqa: E402

BATCH = 64


def photos(n: int, size: int) -> list[bytes]:
    """JPEGs of quality 90 with as many bytes as photos have: smooth shapes and some noise."""
    found, rng = [], np.random.RandomState(0)
    y, x = np.mgrid[:size, :size] / size * 12
    for i in range(n):
        waves = np.stack([np.sin(x + i), np.cos(y * 1.3 + i), np.sin(x * y / 6 + i)], -1)
        file = io.BytesIO()
        pixels = (waves * 90 + 120 + rng.randint(-12, 12, (size, size, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write(images: list[bytes], out: Path) -> dict[str, tuple[str, Path]]:
    """{source: (data.name, data.root)}."""
    import datasets
    import lmdb

    (out / "files").mkdir(parents=True)
    environment = lmdb.open(str(out / "cat"), map_size=2**34)
    with zipfile.ZipFile(out / "files.zip", "w") as archive, environment.begin(write=True) as transaction:
        for i, data in enumerate(images):
            (out / f"files/{i:06d}.jpg").write_bytes(data)
            archive.writestr(f"{i:06d}.jpg", data)
            transaction.put(f"{i:040x}".encode(), data)
    environment.close()
    table = {"image": [{"bytes": data, "path": None} for data in images]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(out / "files.parquet"))
    return {
        "files": ("image_folder", out / "files"),
        "zip": ("image_folder", out / "files.zip"),
        "lmdb": ("lsun_cat", out),
        "parquet": ("huggingface", out / "files.parquet"),
    }


def rate(name: str, root: Path, size: int, workers: int, cache: str) -> float:
    """Images per second over one epoch, workers' start left out."""
    options = {"name": name, "root": str(root), "image_size": size, "channels": 3, "valid_fraction": 0.0}
    images = load_splits(SimpleNamespace(download=False, **options))["train"]
    n_steps = len(images) // BATCH
    stream = Batches(images, 0, BATCH, random_flip=True, cache=cache, num_workers=workers).from_step(0, n_steps)
    next(stream)
    began = time.monotonic()
    n = sum(len(pixels) for _, pixels in stream)
    return n / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels in training")
    parser.add_argument("--stored", type=int, default=256, help="pixels as stored")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/data-benchmark", help="a new folder")
    options = parser.parse_args()
    images = photos(options.images, options.stored)
    places = write(images, options.out.resolve())
    print(
        f"{options.images} JPEGs of {options.stored}x{options.stored}, {len(b''.join(images)) / len(images):,.0f} bytes"
    )
    found = {}
    for source, (name, root) in places.items():
        found[source] = {str(n): rate(name, root, options.size, n, "false") for n in options.workers}
        print(f"{source:9}" + "".join(f"  {n} workers {r:8,.0f} img/s" for n, r in found[source].items()), flush=True)
    found["cached"] = {"-": rate(*places["files"], options.size, 0, "true")}
    print(f"cached     {found['cached']['-']:8,.0f} img/s")
    (options.out / "rates.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
