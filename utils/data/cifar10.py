"""CIFAR-10 from torchvision, which verifies its files' MD5 sums and downloads them where they are missing."""

import tarfile

import numpy as np
import torch

from utils.data.image_set import ImageSet, fit_all
from utils.errors import InputError


def load_cifar10(options) -> dict[str, ImageSet]:
    """{"train": 50,000 images, "test": 10,000}."""
    from torchvision.datasets import CIFAR10

    if hasattr(tarfile, "data_filter"):  # what torchvision unpacks stays below the root; before Python 3.14 it need not
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    sets = {}
    for split in ("train", "test"):
        try:
            found = CIFAR10(options.root, train=split == "train", download=options.download)
        except Exception as error:  # whatever the download or torchvision's check raises
            how = "" if options.download else "; data.download is false"
            raise InputError(
                f"CIFAR-10 is not in {options.root} (cifar-10-batches-py or its .tar.gz, whole) and could not be "
                f"downloaded: {error}{how}"
            ) from None
        images = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
        images = fit_all(images, options.image_size, options.channels)
        sets[split] = ImageSet("cifar10", images, torch.tensor(found.targets), found.classes)
    return sets
