"""LSUN's categories from the LMDBs in which they are published; shorter side resized, centre cut."""

from __future__ import annotations

from pathlib import Path

from utils.data.encoded_set import EncodedSet
from utils.data.image_set import ImageSet, fit_bilinear
from utils.data.sources import Lmdb
from utils.errors import InputError


def load_lsun(category: str, options) -> dict[str, ImageSet]:
    """{"train": ...}, and "test" from the validation LMDB of a scene where that is there too.

    category: "bedroom", "church_outdoor" (scenes, CATEGORY_train_lmdb) or "cat" (an object, in one LMDB).
    """
    splits = {"train": (f"{category}_train_lmdb", category, f"{category}_lmdb"), "test": (f"{category}_val_lmdb",)}
    sets = {}
    for split, names in splits.items():
        places = [Path(options.root) / folder / name for folder in ("", "lsun") for name in names]
        path = next((place for place in places if (place / "data.mdb").is_file()), None)
        if path is not None:
            name = f"lsun_{category.partition('_')[0]}"
            sets[split] = EncodedSet(name, Lmdb(path), options.image_size, options.channels, prepare=fit_bilinear)
        elif split == "train":
            raise InputError(
                f"LSUN's {category} is not in {options.root}: wanted the LMDB {names[0]}/ with data.mdb in it "
                "(github.com/fyu/lsun downloads it as a .zip; unpack that)"
            )
    return sets
