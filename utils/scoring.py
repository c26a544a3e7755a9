"""One evaluation: the reference, the extractor, the floor, and the features of what was generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from diffusions import build_process
from diffusions.generate import Conditions
from utils import classifier, precision
from utils.captions import Asked
from utils.cli import say
from utils.cost import Cost
from utils.data.conditions import as_in_data, cond_of, in_turn
from utils.data.image_set import ImageSet
from utils.distributed import gather_rows, main_process_first, share
from utils.errors import InputError
from utils.fidelity import Extractor, Features, Statistics, open_extractor, scores
from utils.micro_batch import MOST, generate_fitting
from utils.precision_recall import NEIGHBOR
from utils.process import evaluations
from utils.protocol import circumstances, sampling_identity
from utils.readers import check_asked, open_reader
from utils.reference import Reference, features_of
from utils.reference_file import StoredReference
from utils.results import cell_id
from utils.store import Store
from utils.weights import load_network

FEWEST = 10
ACCURACY = "condition_accuracy"
UNCONDITIONAL = Asked("none")
FEW = 10_000  # below this many images FID is far from its value at 50,000


def generated_images(
    accelerator, config: DictConfig, weights, seed: int, chunks: list[list[int]], micro_batch: int | None, cost: Cost,
    cond: Conditions | None = None, fill: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """This process's images, uint8 [b, C, H, W] at a time; no batch goes over the end of one of the chunks of indices.

    What is made is told to `cost`. fill: as for `generate`, for every chunk.
    """
    options = config.sample
    dtype = precision.DTYPES[precision.mixed_precision(options.mixed_precision)]
    process, n = build_process(config.diffusion), sum(map(len, chunks))
    net = load_network(weights, accelerator.device, dtype, evaluations(config) * n)
    steps = options.skip_steps or process.total_steps
    bar = tqdm(total=n, desc=f"{options.sampler}-{steps}", unit="img", file=sys.stderr,
               disable=not accelerator.is_main_process)  # fmt: skip
    cost.start()
    more = {"cond": cond, "dtype": dtype, "fill": fill}
    with bar:
        for chunk in chunks:
            for batch in generate_fitting(net, process, options, chunk, seed, micro_batch, **more):
                bar.update(len(batch.indices))
                cost.add(evaluations(config) * len(batch.indices))
                yield batch.images
                cost.start()


def generative(options: DictConfig) -> list[str]:
    """The metrics of the evaluate section that compare images; bpd does not."""
    return [metric for metric in options.metrics if metric != "bpd"]


def check_count(n: int, extractor: Extractor, reference: Reference, force: bool) -> None:
    """Raise InputError for fewer images than feature dimensions, unless forced; warn under 10,000."""
    real = reference.images
    dims = extractor.n_features(extractor([real[0][None]]))
    for what, count in ((f"{n} images", n), (f"reference {real.name} of {len(real)} images", len(real))):
        if count < FEWEST:
            raise InputError(f"{what}: wanted at least {FEWEST}, the splits of IS and the neighbours of precision")
        if count < dims and not force:
            raise InputError(
                f"{what}: fewer than the {dims} dimensions of {extractor.name}, so that FID has no meaning; "
                "--force scores all the same"
            )
    if n < FEW:
        say(f"note: scores of {n:,} images are not comparable with those of 50,000; they are reported as @{n}")


def conditions_for(config: DictConfig, found: Reference | StoredReference, n: int) -> tuple[Asked, Tensor | None]:
    """What images 0..n-1 are asked to show, and their classes: as in the reference, or each class in turn.

    Raises:
        InputError: a network of free texts, and a reference without texts.
    """
    classes = list(config.model.classes)
    images = None if isinstance(found, StoredReference) else found.images
    if config.model.condition == "none":
        return UNCONDITIONAL, None
    has = None if images is None else images.labels if classes else images.captions
    if has is not None and (not classes or images.classes == classes):
        return as_in_data(config, images, n)
    if not classes:
        raise InputError(f"{found.name} has no texts for the images to show (image folders: metadata.jsonl)")
    say(f"note: {found.name} does not have the network's classes as labels, so each is asked for equally often")
    return in_turn(config), torch.arange(n) % len(classes)


def check_conditional(config: DictConfig, found, labels: Tensor | None, per_class: bool) -> None:
    """Raise InputError for condition_accuracy or --per_class where it can't be had."""
    if ACCURACY in config.evaluate.metrics:
        if labels is None:
            raise InputError(f"the metric {ACCURACY} needs --weights of a network that was trained on classes")
        if config.evaluate.feature_extractor != classifier.NAME:
            raise InputError(f"the metric {ACCURACY} needs --feature_extractor {classifier.NAME}")
    known = None if isinstance(found, StoredReference) else found.images.classes
    labelled = known == list(config.model.classes)
    if ACCURACY in config.evaluate.metrics and known and not labelled:
        raise InputError(f"the metric {ACCURACY} needs a reference with the network's classes; {found.name} has others")
    if per_class and (labels is None or not labelled):
        raise InputError(
            "--per_class needs --weights of a network that was trained on classes, and a labelled reference"
        )


def check_class_counts(labels: Tensor, extractor: Extractor, found: Reference, force: bool) -> None:
    """Raise InputError where a class has fewer images, made or real, than feature dimensions (forced: neighbours)."""
    dims = extractor.n_features(extractor([found.images[0][None]]))
    for what, counted in (("images", labels), ("reference images", found.images.labels)):
        counts = counted.bincount(minlength=len(found.images.classes))
        fewest, rarest = int(counts.min()), found.images.classes[int(counts.argmin())]
        if fewest <= NEIGHBOR:
            raise InputError(
                f"--per_class: the class {rarest} has {fewest} {what}: wanted at least {NEIGHBOR + 1}, the neighbours "
                "of precision (a larger --n_samples, or a larger reference)"
            )
        if fewest < dims and not force:
            raise InputError(
                f"--per_class: the class {rarest} has {fewest} {what}, fewer than the {dims} dimensions of "
                f"{extractor.name}, so that FID has no meaning; --force scores all the same"
            )


def open_for_scores(
    accelerator, options: DictConfig, found: Reference | StoredReference, metrics: list[str]
) -> tuple[Extractor, float | None]:
    """The extractor of the evaluate section and, of a dataset classifier (trained if need be), its test accuracy.

    Raises:
        InputError: weights that are missing, damaged, or not those of the reference's features.
    """
    path, accuracy = options.feature_extractor_weights, None
    stored = isinstance(found, StoredReference)
    if options.feature_extractor == classifier.NAME and stored:
        if path is None:
            raise InputError(
                f"--reference {found.path} was made with a {classifier.NAME}: give that one's file with "
                f"--feature_extractor_weights {options.cache_dir}/{classifier.NAME}-....safetensors"
            )
        classifier.check_file(path)
    elif options.feature_extractor == classifier.NAME:
        if path is not None:
            raise InputError(f"evaluate.feature_extractor_weights: {classifier.NAME} trains its own")
        with main_process_first(accelerator):  # one trains, the others then read its file
            trained = classifier.trained(found.train, found.test, Path(options.cache_dir), accelerator.device)
        path, accuracy = str(trained.path), trained.test_accuracy
        shown = "unknown, there is no test split" if accuracy is None else f"{accuracy:.2%}"
        say(f"dataset classifier of {found.train.name}: test accuracy {shown}")
    with main_process_first(accelerator):  # one downloads
        extractor = open_extractor(options.feature_extractor, path, metrics, options.batch_size, accelerator.device)
    if stored:
        found.check_extractor(extractor, extractor.n_features(extractor([found[0][None]])))
    return extractor, accuracy


@dataclass
class Scorer:
    """The real side of an evaluation, made once for all its cells."""

    accelerator: Any
    config: DictConfig
    reference: Reference | StoredReference
    extractor: Extractor
    real: Features
    real_train: Features | None
    real_test: Features | None
    test_accuracy: float | None
    statistics: Statistics | None = None  # of a reference that was read from a file
    asked: Asked = UNCONDITIONAL
    labels: Tensor | None = None  # [n], the class that each image was asked for
    per_class: bool = False
    floors: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        accelerator,
        config: DictConfig,
        found: Reference,
        n: int,
        images: ImageSet | None,
        force: bool = False,
        per_class: bool = False,
    ) -> Scorer:
        """Make the extractor (training the classifier if need be), extract the reference's features.

        config: the checkpoint's, or the one asked for where `images` are scored; n: how many images that will be.
        force: go on where there are fewer images than feature dimensions.
        per_class: `class_scores` will be asked for.

        Raises:
            InputError: weights or counts that can't be used; told before features are extracted.
        """
        cache = Path(config.evaluate.cache_dir)
        asked, labels = conditions_for(config, found, n) if images is None else (UNCONDITIONAL, None)
        check_conditional(config, found, labels, per_class)
        check_asked(asked, open_reader(config, accelerator.device))
        extractor, accuracy = open_for_scores(accelerator, config.evaluate, found, generative(config.evaluate))
        check_count(n, extractor, found, force)
        if per_class:
            check_class_counts(labels, extractor, found, force)
        has_floor = found.test is not None and len(found.test) >= FEWEST
        for_floor = [found.train, found.test] if has_floor else [None, None]
        stored = found if isinstance(found, StoredReference) else None
        real, train, test = (
            None if images is None else features_of(images, extractor, cache, accelerator)
            for images in (None if stored else found.images, *for_floor)
        )
        real, statistics = (stored.features, stored.statistics) if stored else (real, None)
        return cls(
            accelerator, config, found, extractor, real, train, test, accuracy, statistics, asked, labels, per_class
        )

    @property
    def cond(self) -> Conditions:
        """Indices -> their conditions."""
        return partial(cond_of, self.asked, open_reader(self.config, self.accelerator.device))

    def features(self, batches: Iterable[Tensor]) -> Features:
        """Features of all processes' images, in the order of their indices. A collective."""
        found = self.extractor(batches)
        return {layer: gather_rows(self.accelerator, value) for layer, value in found.items()}

    def generated(
        self, cell: DictConfig, weights, seed: int, protocol: dict, options, cost: Cost
    ) -> tuple[Features, float]:
        """(features of the cell's images 0..n-1, seconds that it took). A collective; whole on the main process.

        options: the command line's, with micro_batch and store: the folder of a `Store`, or None to hold a batch at a
        time in memory.
        """
        micro_batch, root = options.micro_batch, options.store
        accelerator, n, began = self.accelerator, protocol["n"], time.monotonic()
        if root is None:
            mine = share(n, accelerator.process_index, accelerator.num_processes).tolist()
            batches = generated_images(accelerator, cell, weights, seed, [mine], micro_batch, cost, self.cond)
            return self.features(batches), time.monotonic() - began
        chunk = micro_batch or MOST.get(accelerator.device.type, 128)
        store = Store(Path(root), protocol["source"], self.extractor, n, chunk)

        def make(chunks: list[list[int]]) -> Iterator[Tensor]:
            cost.skip(evaluations(cell) * (n - sum(map(len, chunks)) * accelerator.num_processes))
            common = (accelerator, cell, weights, seed, chunks, micro_batch, cost, self.cond)
            batches = generated_images(*common, fill=n > chunk)  # and the last chunk alone, after a kill, as before it
            for indices in chunks:
                parts: list[Tensor] = []
                while sum(map(len, parts)) < len(indices):
                    parts.append(next(batches))
                yield torch.cat(parts)

        store.fill(accelerator, make)
        found, seconds = store.features() if accelerator.is_main_process else ({}, 0.0)
        return found, seconds / accelerator.num_processes

    def scores(self, generated: Features) -> dict[str, float]:
        """The metrics asked for, of what was generated against the reference."""
        options = self.config.evaluate
        found = scores(
            *(generative(options), self.extractor, generated, self.real, options.kid_subset_size, self.statistics),
            cache_dir=Path(options.cache_dir),
        )
        if ACCURACY in options.metrics:
            predicted = generated[self.extractor.layers[ACCURACY]].argmax(1)
            found[ACCURACY] = (predicted == self.labels).float().mean().item()
        return found

    def class_scores(self, generated: Features) -> dict[str, dict[str, float]]:
        """{class: FID, KID, precision and recall, as asked for, of its images against the real ones of that class}."""
        options, found = self.config.evaluate, {}
        metrics = [metric for metric in generative(options) if metric in ("fid", "kid", "prc")]
        for i, name in enumerate(self.config.model.classes):
            made = {layer: value[self.labels == i] for layer, value in generated.items()}
            real = {layer: value[self.reference.images.labels == i] for layer, value in self.real.items()}
            values = scores(metrics, self.extractor, made, real, options.kid_subset_size)
            if ACCURACY in options.metrics:
                predicted = made[self.extractor.layers[ACCURACY]].argmax(1)
                values[ACCURACY] = (predicted == i).float().mean().item()
            found[name] = values
        return found

    def floor(self, n: int) -> dict[str, Any]:
        """The score of real training images, as many as were generated, against the test split; None without one."""
        if self.real_test is None:
            test = self.reference.test
            label = "no test split" if test is None else f"test split of {len(test)} images is too small"
            return {"floor": None, "floor_label": label}
        if n not in self.floors:
            count = min(n, len(self.reference.train))
            rows = torch.arange(count) * len(self.reference.train) // count
            real = {layer: value[rows] for layer, value in self.real_train.items()}
            options = self.config.evaluate
            values = scores(
                *(generative(options), self.extractor, real, self.real_test, options.kid_subset_size),
                cache_dir=Path(options.cache_dir),
            )
            train, test = self.reference.train, self.reference.test
            label = f"{count:,} of {train.name} against {test.name} ({len(test):,})"
            self.floors[n] = {"floor": values, "floor_label": label}
        return self.floors[n]

    def label(self, config: DictConfig, weights, options, seed: int) -> str:
        """What a row of the table is about."""
        if weights is None:
            return str(options.images)
        origin = f"{weights.origin} ({weights.kind}), seed {seed}"
        sample = config.sample
        eta = f", eta {sample.eta:g}" if sample.eta else ""
        eta += f", guidance {sample.guidance_scale:g}" if self.asked.entries else ""
        steps = sample.skip_steps or config.diffusion.total_steps
        return f"{sample.sampler}, {steps} {sample.skip_type} steps{eta}; {origin}"

    def protocol(self, config: DictConfig, weights, seed: int, images: ImageSet | None, n: int) -> dict[str, Any]:
        """Everything that the scores of a cell depend on."""
        evaluate = config.evaluate
        if weights is not None:
            name = precision.mixed_precision(config.sample.mixed_precision)
            source = sampling_identity(weights, config, build_process(config.diffusion), seed, name, self.asked)
        else:
            source = {"images_sha256": images.content_hash()}
        return {
            "source": source,
            "n": n,
            "reference": self.reference.name,
            "reference_sha256": self.reference.images.content_hash(),
            "image_size": config.data.image_size if images is None else images.size,
            "extractor": self.extractor.name,
            "extractor_weights_sha256": self.extractor.weights_sha256,
            "metrics": generative(evaluate),
            "kid_subset_size": evaluate.kid_subset_size,
            **({"per_class": True} if self.per_class else {}),
        }

    def row(
        self, config: DictConfig, weights, options, seed: int, protocol: dict, values: dict, seconds: float | None,
        per_class: dict[str, dict[str, float]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A row of the results: `values`, the scores, with all that belongs to them."""
        total = config.diffusion.total_steps
        steps = config.sample.skip_steps or total
        return {
            "id": cell_id(protocol),
            "label": self.label(config, weights, options, seed),
            "reference": self.reference.name,
            "extractor": self.extractor.name,
            "n": protocol["n"],
            "scores": values,
            **({"per_class": per_class} if per_class else {}),
            **self.floor(protocol["n"]),
            "seconds_per_image": seconds / protocol["n"] if seconds else None,
            **({"evaluations": evaluations(config), "steps": steps, "total_steps": total} if weights else {}),
            "protocol": protocol,
            "circumstances": circumstances(weights, self.accelerator)
            | {"classifier_test_accuracy": self.test_accuracy},
        }
