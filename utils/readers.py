"""Texts -> what a network of model.condition = text is given: their bytes, or the features of a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.conditioning import tokenize
from utils.captions import Asked, is_unicode
from utils.config import set_key
from utils.errors import InputError
from utils.frozen_encoder import FrozenEncoder, open_encoder


class ByteReader:
    """For the transformer that is trained jointly: tokens [B, length] int64, the bytes of each text."""

    unit, extra = "bytes", 1  # the start token

    def __init__(self, length: int) -> None:
        self.length = length
        self.row = lru_cache(2**16)(lambda text: tokenize([text], length)[0])

    def size(self, text: str) -> int:
        return len(text.casefold().encode())

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The `cond` of images with these texts, on the host; the empty text is no condition."""
        return {"tokens": torch.stack([self.row(text) for text in texts])}


class FeatureReader:
    """For a frozen encoder: features [B, length, width] float32, and present [B, length] bool, where there are any."""

    unit, extra = "tokens", 0

    def __init__(self, place: str, length: int, sha256: str | None, device: str) -> None:
        self.place, self.length, self.sha256, self.device = place, length, sha256, device

    @cached_property
    def encoder(self) -> FrozenEncoder:
        """Raises InputError where it is not the one that the network was trained with."""
        found = open_encoder(self.place, self.device)
        if self.sha256 not in (None, found.sha256):
            raise InputError(
                f"model.text_encoder = {self.place} has other weights or another vocabulary than the encoder that the "
                f"network was trained with: SHA-256 {found.sha256[:16]}..., wanted {self.sha256[:16]}..."
            )
        if found.most is not None and self.length > found.most:
            raise InputError(f"model.text_length = {self.length}: {self.place} reads at most {found.most} tokens")
        return found

    def size(self, text: str) -> int:
        return len(self.encoder.tokens(text))

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As of `ByteReader`."""
        features = torch.zeros(len(texts), self.length, self.encoder.width)
        present = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for i, text in enumerate(texts):
            if text:
                found = self.encoder.features(text)
                features[i, : len(found)], present[i, : len(found)] = found, True
        return {"features": features, "present": present}


Reader = ByteReader | FeatureReader


def open_reader(config: DictConfig, device) -> Reader | None:
    """That of a configuration; None where no text is read. A frozen encoder is loaded at first use, on `device`."""
    model = config.model
    if model.condition != "text":
        return None
    if model.text_encoder is None:
        return ByteReader(model.text_length)
    place = Path(model.text_encoder)
    place = str(place.resolve()) if place.is_dir() else model.text_encoder
    return FeatureReader(place, model.text_length, model.text_encoder_sha256, str(device))


def settle_encoder(config: DictConfig, device) -> None:
    """Fill in what a frozen encoder is, where a new run has one: its width, and the SHA-256 of its content."""
    reader = open_reader(config, device)
    if not isinstance(reader, FeatureReader):
        return
    found = reader.encoder
    for name, value in {"": found.place, "_width": found.width, "_sha256": found.sha256}.items():
        set_key(config, f"model.text_encoder{name}", value, f"the encoder {found.place}")


def check_text(text: str | None, reader: Reader, whose: str) -> None:
    """Raise InputError for a text of the data that can't be read: none, malformed, or too long."""
    if text is None or not text.strip():
        raise InputError(f"model.condition = text: {whose} has no text")
    if not is_unicode(text):
        raise InputError(f"model.condition = text: the text of {whose} is not valid Unicode: {text[:30]!r}")
    if (needed := reader.size(text) + reader.extra) > reader.length:
        raise InputError(
            f"model.text_length = {reader.length}: the text of {whose} has {needed - reader.extra} {reader.unit}, "
            f"so wanted at least {needed}"
        )


def check_asked(asked: Asked, reader: Reader | None) -> None:
    """Raise InputError where a frozen encoder can't be had, or a text (also a class's caption) is too long."""
    if reader is None or not asked.entries:
        return
    most = reader.length - reader.extra
    for text in dict.fromkeys(asked.entries):
        if (size := reader.size(text)) > most:
            raise InputError(f"prompt {text[:30]!r}...: has {size} {reader.unit}, but the network reads at most {most}")
