"""What the network is told about each training image: its class, or one of its captions; sometimes nothing.

Which caption, and whether the condition is dropped, are counter-based functions of (seed, position), as all else that
training draws.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusions.noise import permutation, randint, random_words
from diffusions.transfer import on
from utils.captions import Asked, captions_of, templates
from utils.config import set_key
from utils.data.batches import Batches
from utils.data.image_set import ImageSet
from utils.errors import InputError
from utils.readers import FeatureReader, Reader, check_text, open_reader, settle_encoder

DRAW_CAPTION, DRAW_DROP = 3, 4  # beside those of utils/data/batches.py
SEED_AS_IN_DATA = 0x1ABE1  # the labels of image i of an evaluation are the same for every sampling seed


def settle(config: DictConfig, images: ImageSet, device, resumed: bool) -> None:
    """Fill in model.classes, and data.captions for text, from the training images: in a new run those decide.

    And what a frozen text encoder is, which is loaded on `device`.

    Raises:
        InputError: images without labels or texts, classes other than those of the run that is resumed, or texts that
            are too long.
    """
    model, data = config.model, config.data
    if model.condition == "none":
        return
    settle_encoder(config, device)
    own_texts = model.condition == "text" and data.captions is None and images.captions is not None
    if own_texts:
        return
    if images.labels is None or not images.classes:
        texts = " and no texts (image folders: metadata.jsonl)" if model.condition == "text" else ""
        raise InputError(
            f"model.condition = {model.condition} needs labels, and {images.name} has none{texts}; "
            "in image folders the first level of folders is the class"
        )
    if resumed and list(model.classes) != images.classes:
        raise InputError(
            f"model.classes = {list(model.classes)[:8]}... are not those of {images.name}: {images.classes[:8]}..."
        )
    set_key(config, "model.classes", list(images.classes), f"the classes of {images.name}")
    if model.condition == "text":
        OmegaConf.update(config, "data.captions", templates(config), merge=False)
        Captions(config, images).check(open_reader(config, device))


class Captions:
    """The texts of a set's images: each image's own, or those of its class but for the ones held out."""

    def __init__(self, config: DictConfig, images: ImageSet) -> None:
        self.config, self.labels = config, None
        if config.model.classes:
            held_out = {text.casefold() for text in config.data.captions_held_out}
            every = [captions_of(name, templates(config)) for name in config.model.classes]
            if unknown := held_out - {text for texts in every for text in texts}:
                raise InputError(f"data.captions_held_out: {min(unknown)!r} is no caption of any class")
            self.texts = [[text for text in texts if text not in held_out] for texts in every]
            self.labels = images.labels
            for name, texts in zip(config.model.classes, self.texts):
                if not texts:
                    raise InputError(f"data.captions_held_out leaves no caption for the class {name}")
        else:
            self.texts = [[text] for text in images.captions]

    def check(self, reader: Reader) -> None:
        """Raise InputError where one can't be read."""
        for name, texts in zip(self.config.model.classes, self.texts):
            for text in texts:
                check_text(text, reader, f"the class {name} ({text!r})")


class Conditions:
    """The `cond` of images of a set, as tensors on a device; empty for an unconditional network."""

    def __init__(self, config: DictConfig, images: ImageSet | None, device) -> None:
        """Of a configuration that is settled, for a set of images or for none at all.

        Raises:
            InputError: the images have no such condition.
        """
        self.kind, self.device = config.model.condition if images is not None else "none", device
        self.reader = open_reader(config, device)
        if self.kind == "none":
            self.shown = lambda indices: None
            return
        self.n_classes, self.labels = len(config.model.classes), images.labels
        if self.n_classes and (images.labels is None or images.classes != config.model.classes):
            raise InputError(f"{images.name} does not have the classes that the network knows")
        if self.kind == "text":
            if not self.n_classes and images.captions is None:
                raise InputError(f"{images.name} has no texts (image folders: metadata.jsonl)")
            self.captions = Captions(config, images)
            if not self.n_classes:
                for i, text in enumerate(images.captions):
                    check_text(text, self.reader, f"image {i} of {images.name}")
        asked = shown_in_preview(config, images)
        self.shown = lambda indices: cond_of(asked, self.reader, indices)

    @classmethod
    def settled(cls, config: DictConfig, images: ImageSet, device, resumed: bool = False) -> Conditions:
        """Of the training images, from which the configuration takes what it does not say (`settle`)."""
        settle(config, images, device, resumed)
        return cls(config, images, device)

    def describe(self) -> str:
        """One line for a person."""
        if self.kind == "class":
            return f"{self.n_classes} classes"
        read_by = f", read by {self.reader.place} (frozen)" if isinstance(self.reader, FeatureReader) else ""
        if not self.n_classes:
            return f"a text for each of {len(self.captions.texts):,} images{read_by}"
        return f"texts of {self.n_classes} classes, {sum(map(len, self.captions.texts))} captions{read_by}"

    def at(self, step: int, batches: Batches, dropout: float) -> dict[str, Tensor]:
        """Those of a step's batch. All on the host, so that it does not wait for the device."""
        if self.kind == "none":
            return {}
        positions = batches.positions(step)
        return self.of(batches.seed, positions, batches.image_ids(positions), dropout)

    def of(self, seed: int, positions: Tensor, ids: Tensor, dropout: float = 0.0) -> dict[str, Tensor]:
        """The conditions of images `ids` [b] that stand at `positions` [b] of the stream; some are left out.

        dropout: the probability of that.
        """
        if self.kind == "none":
            return {}
        ids, positions = ids.cpu(), positions.cpu()
        drop = random_words(seed, positions, DRAW_DROP, 1)[:, 0] < dropout * 2**32
        if self.kind == "class":
            return {"label": on(self.labels[ids].masked_fill(drop, self.n_classes), self.device)}
        texts = zip(self.texts(seed, positions, ids), drop.tolist())
        found = self.reader(["" if dropped else text for text, dropped in texts])
        return {name: on(value, self.device) for name, value in found.items()}

    def texts(self, seed: int, positions: Tensor, ids: Tensor) -> list[str]:
        """One caption of each image."""
        keys = ids if self.captions.labels is None else self.captions.labels[ids]
        words = randint(seed, positions, DRAW_CAPTION, 2**31)
        choices = [self.captions.texts[key] for key in keys.tolist()]
        return [texts[word * len(texts) >> 31] for texts, word in zip(choices, words.tolist())]


def as_in_data(config: DictConfig, images: ImageSet, n: int) -> tuple[Asked, Tensor | None]:
    """Conditions for images 0..n-1 distributed as those of a data set, and the class of each [n] where there are any.

    Images are taken in a random order, without repetition until all were taken; entry i does not depend on n.
    """
    kind = config.model.condition
    if kind == "none":
        return Asked(kind), None
    conditions = Conditions(config, images, "cpu")
    order, seen = [], 0
    while seen < n:
        order += permutation(SEED_AS_IN_DATA, len(images), seen // len(images)).tolist()
        seen += len(images)

    ids, positions = torch.tensor(order[:n]), torch.arange(n)
    labels = None if images.labels is None or not conditions.n_classes else images.labels[ids]
    if kind == "class":
        entries = tuple(labels.tolist())
        return Asked(kind, entries, tuple(config.model.classes[i] for i in entries)), labels
    texts = tuple(conditions.texts(SEED_AS_IN_DATA, positions, ids))
    return Asked(kind, texts, texts), labels


def in_turn(config: DictConfig) -> Asked:
    """Every class that the network knows, by its name where it reads text."""
    kind, classes = config.model.condition, list(config.model.classes)
    if kind == "class":
        return Asked(kind, tuple(range(len(classes))), tuple(classes))
    texts = tuple(captions_of(name, templates(config))[0] for name in classes)
    return Asked(kind, texts, texts)


def shown_in_preview(config: DictConfig, images: ImageSet) -> Asked:
    """The classes in turn; evenly spaced texts where images have their own."""
    if config.model.classes:
        return in_turn(config)
    n = min(config.train.n_samples, len(images))
    texts = tuple(images.captions[i * len(images) // n] for i in range(n))
    return Asked(config.model.condition, texts, texts)


def cond_of(asked: Asked, reader: Reader | None, indices: Iterable[int]) -> dict[str, Tensor] | None:
    """What `generate` needs of what was asked for, one row for each of the indices; None: no condition."""

    if not asked.entries:
        return None
    chosen = [asked.entries[int(i) % len(asked.entries)] for i in indices]
    if asked.kind == "class":
        return {"label": torch.tensor(chosen, dtype=torch.int64)}
    return reader(chosen)
