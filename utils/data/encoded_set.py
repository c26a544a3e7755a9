"""Images that are read and decoded one at a time, whatever they lie in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from utils.data.decode import decode
from utils.data.image_set import ImageSet, fit
from utils.data.sources import Source


class EncodedSet(ImageSet):
    """Some or all images of a source.

    Args:
        ids: int64 [N], which ones; None for all in order.
        labels: int64 [N], or None.
        prepare: (uint8 [C, H, W], size) -> [C, size, size], the data set's own way to cut and resize.
        captions: a text for each of them (None: none for that one), or None.
    """

    def __init__(
        self, name: str, source: Source, size: int, channels: int, ids: Tensor | None = None,
        labels: Tensor | None = None, classes: Sequence[str] = (), prepare: Callable[[Tensor, int], Tensor] = fit,
        captions: Sequence[str | None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, None, labels, classes, captions)
        self.source, self.size, self.channels, self.prepare = source, size, channels, prepare
        self.ids = torch.arange(len(source)) if ids is None else ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Tensor:
        i = int(self.ids[i])
        return self.prepare(decode(self.source.read(i), self.channels, self.source.name(i)), self.size)

    def subset(self, indices: Tensor, name: str) -> EncodedSet:
        labels = None if self.labels is None else self.labels[indices]
        return EncodedSet(
            name, self.source, self.size, self.channels, self.ids[indices], labels, self.classes, self.prepare,
            self.captions_of(indices),
        )  # fmt: skip

    def n_bytes(self) -> int:
        return len(self) * self.channels * self.size**2

    @cached_property
    def _content_hash(self) -> str:
        """SHA-256 over the files' bytes and what they become, without decoding them."""
        how = "" if self.prepare is fit else f" {self.prepare.__name__}"
        digest = hashlib.sha256(f"{self.size} {self.channels}{how}".encode())
        for i in self.ids.tolist():
            digest.update(hashlib.sha256(self.source.read(i)).digest())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()
