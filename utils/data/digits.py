"""Handwritten digits that ship inside scikit-learn: 1,797 images of 8x8 pixels, one channel. No download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from utils.data.image_set import ImageSet, fit_all


def load_digits(options) -> dict[str, ImageSet]:
    """{"train": all images}. Levels 0..16 become round(x * 255 / 16)."""
    # Its file, without scikit-learn around it, which takes two seconds to import
    packages = find_spec("sklearn").submodule_search_locations
    rows = torch.from_numpy(np.loadtxt(Path(packages[0], "datasets/data/digits.csv.gz"), np.int64, delimiter=","))
    levels, labels = rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].contiguous()
    images = fit_all((levels * (255 / 16)).round().to(torch.uint8), options.image_size, options.channels)
    return {"train": ImageSet("digits", images, labels, [str(digit) for digit in range(10)])}
