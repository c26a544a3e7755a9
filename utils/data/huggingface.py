"""Image data sets of the Hugging Face hub by name, and parquet files: data.root is the name, a file or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from utils.data.encoded_set import EncodedSet
from utils.data.image_set import ImageSet
from utils.data.sources import Table
from utils.errors import InputError

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}


def load_huggingface(options) -> dict[str, ImageSet]:
    """{"train": ..., maybe "test": ...}; the first column of images, of class labels where there is one,
    and the texts of a column named text or caption.

    Raises:
        InputError: the package or the data set is missing, or it holds no images.
    """
    root = Path(options.root)
    local = root.exists()
    if not options.download:
        os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the package is imported
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data.name = huggingface: the package datasets is missing: pip install 'datasets>=4'"
        ) from None
    datasets.disable_progress_bars()
    try:
        tables = (
            datasets.load_dataset("parquet", data_files=_parquet(root)) if local else datasets.load_dataset(str(root))
        )
    except InputError:
        raise
    except Exception as error:  # of the network, the hub, arrow, or the file's format
        kind = "parquet files" if local else "a data set of the Hugging Face hub"
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"data.root = {root} can't be read as {kind}: {why}") from None
    sets = {}
    for split, names in SPLITS.items():
        found = next((name for name in names if name in tables), None)
        if found is None and split == "train" and len(tables) == 1:
            found = next(iter(tables))
        if found is not None:
            sets[split] = _image_set(tables[found], root.stem if local else root.name, options, local)
        elif split == "train":
            raise InputError(f"data.root = {root} has the splits {', '.join(tables)}, and no train")
    return sets


def _parquet(root: Path) -> dict[str, list[str]]:
    """{split: files}; the file's name says the split, as the hub's do (test-00000-of-00001.parquet)."""
    paths = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not paths or any(path.suffix != ".parquet" for path in paths):
        raise InputError(f"data.root = {root} is neither a .parquet file nor a folder that holds some")
    files: dict[str, list[str]] = {}
    for path in paths:
        word = path.stem.partition("-")[0]
        files.setdefault("test" if word in SPLITS["test"] else "train", []).append(str(path))
    return files


def _image_set(table: Any, name: str, options, local: bool) -> EncodedSet:
    from datasets import ClassLabel, Image

    column = next((column for column, kind in table.features.items() if isinstance(kind, Image)), None)
    if column is None:  # bytes and a path, as images are stored where a file does not say that they are
        column = next((c for c, kind in table.features.items() if isinstance(kind, dict) and "bytes" in kind), None)
        if column is None:
            raise InputError(f"data.root = {options.root} has no column of images: it has {', '.join(table.features)}")
    else:
        table = table.cast_column(column, Image(decode=False))
    label = next((column for column, kind in table.features.items() if isinstance(kind, ClassLabel)), None)
    labels = None if label is None else torch.tensor(table[label][:], dtype=torch.int64)
    classes = [] if label is None else table.features[label].names
    text = next((name for name in ("text", "caption") if name in table.features), None)
    captions = None if text is None else [value if isinstance(value, str) else None for value in table[text][:]]
    return EncodedSet(
        name, Table(table, column, str(options.root), not local), options.image_size, options.channels,
        labels=labels, classes=classes, captions=captions,
    )  # fmt: skip
