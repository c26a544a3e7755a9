"""Handwritten digits that ship inside scikit-learn: 1,797 images of 8x8 pixels, one channel. No download."""

import torch

from utils.data.image_set import ImageSet, fit_all


def load_digits(options) -> dict[str, ImageSet]:
    """{"train": all images}. Levels 0..16 become round(x * 255 / 16)."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy((bunch.images * (255 / 16)).round()).to(torch.uint8)[:, None]
    images = fit_all(images, options.image_size, options.channels)
    labels = torch.from_numpy(bunch.target).long()
    return {"train": ImageSet("digits", images, labels, [str(digit) for digit in range(10)])}
