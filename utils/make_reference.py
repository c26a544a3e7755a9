"""`evaluate_ddpm.py --make_reference NAME|DIR --out FILE.npz`: measure real images once, for all to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from utils import distributed, precision, reference_file
from utils.cli import say
from utils.data.image_folder import load_as_is
from utils.errors import InputError, SaveFailed
from utils.reference import Reference, features_of, open_reference, recipe_data
from utils.scoring import open_for_scores


def make(text: str, out: str | None, config: DictConfig, asked: dict[str, Any]) -> int:
    """Write the statistics of a data set's split (at its recipe's size, or data.image_size) or of a folder as it is.

    Raises:
        InputError: no such data set, no .npz to write, or an extractor that can't be had.
        SaveFailed: the file can't be written.
    """
    if not out or not out.endswith(".npz"):
        raise InputError(f"--out {out}: --make_reference writes one file, --out FILE.npz" if out else
                         "--make_reference needs --out FILE.npz")  # fmt: skip
    accelerator = distributed.start()
    precision.set_determinism(precision.wants_determinism("auto"), tf32=False)
    if Path(text).is_dir() and "data.image_size" not in asked:
        images = load_as_is(text, "--make_reference")
        found, size, channels = Reference(images, images, None), images.size, images.channels
    else:
        data = recipe_data(text.partition(":")[0], asked)
        size, channels = data.image_size, data.channels
        with distributed.main_process_first(accelerator):
            found = open_reference(text, None, asked, size, channels, "--make_reference")
    extractor, _ = open_for_scores(accelerator, config.evaluate, found, ["fid", "kid", "prc"])
    features = features_of(found.images, extractor, Path(config.evaluate.cache_dir), accelerator)
    why = None
    if accelerator.is_main_process:
        try:
            reference_file.save(Path(out), found, features, extractor, size, channels)
        except OSError as error:
            why = f"{out} can't be written: {error.strerror}"
    if why := distributed.from_main(accelerator, why):
        raise SaveFailed(why)
    say(f"{out}: {len(found.images):,} images of {found.name}, {channels} x {size}^2, by {extractor.name}")
    return 0
