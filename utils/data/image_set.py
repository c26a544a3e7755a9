"""What every data source becomes: an indexed set of uint8 images of one size, with labels where there are any."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class ImageSet:
    """Images in memory.

    Attributes:
        name: what reports call it, such as "digits:train".
        images: uint8 [N, C, H, W], or None where they are read one by one (see `encoded_set.EncodedSet`).
        labels: int64 [N], or None.
        classes: names of the classes; empty without labels.
        captions: a text for each image (None: none for that one), or None.
    """

    def __init__(
        self, name: str, images: Tensor | None, labels: Tensor | None, classes: Sequence[str],
        captions: Sequence[str | None] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.images, self.labels, self.classes = name, images, labels, list(classes)
        self.captions = captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        """uint8 [C, H, W]."""
        return self.images[i]

    def subset(self, indices: Tensor, name: str) -> ImageSet:
        """The images `indices` [n], in that order, under another name."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSet(name, self.images[indices], labels, self.classes, self.captions_of(indices))

    def captions_of(self, indices: Tensor) -> list[str | None] | None:
        """The texts of the images `indices` [n]; None where the set has none."""
        return None if self.captions is None else [self.captions[i] for i in indices.tolist()]

    def n_bytes(self) -> int:
        """Size of the decoded images [bytes]."""
        return self.images.numel()

    def content_hash(self) -> str:
        """The identity of caches and protocols; computed once."""
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        """SHA-256 over the pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def to_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 [..., C, H, W] with C of 1 or 3 -> `channels`, by ITU-R 601 luma or by repetition."""
    if images.shape[-3] == channels:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, -1, -1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    return (images * weights).sum(-3, keepdim=True).round().to(torch.uint8)  # rounded: equal channels keep their level


def fit(images: Tensor, size: int) -> Tensor:
    """uint8 [..., C, H, W] -> [..., C, size, size]: shorter side resized (antialiased bicubic), then the centre cut."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    from torchvision.transforms.v2 import functional as transforms  # takes a second, which images that fit don't need

    images = transforms.resize(images, [size], transforms.InterpolationMode.BICUBIC, antialias=True)
    return transforms.center_crop(images, [size, size])


def fit_bilinear(image: Tensor, size: int) -> Tensor:
    """uint8 [C, H, W] -> [C, size, size] as the DDIM authors prepare CelebA and LSUN: Pillow's bilinear filter.

    The same filter on tensors rounds half a percent of the levels otherwise.
    """
    from torchvision.transforms.v2 import functional as transforms

    resized = transforms.resize(transforms.to_pil_image(image), [size], transforms.InterpolationMode.BILINEAR)
    return transforms.pil_to_tensor(transforms.center_crop(resized, [size, size]))


def fit_all(images: Tensor, size: int, channels: int) -> Tensor:
    """`to_channels` and `fit` for a whole array, a slice at a time to bound memory."""
    return torch.cat([fit(to_channels(part, channels), size) for part in images.split(4096)]).contiguous()
