"""Features and scores through torch-fidelity: its extractors, its formulas, fed with uint8 images from memory."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import metric_fid, metric_isc, metric_kid
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from utils import classifier
from utils.checkpoint import sha256
from utils.errors import InputError
from utils.precision_recall import precision_recall

Features = dict[str, Tensor]  # layer -> float32 [N, D], on the CPU
Statistics = dict[str, np.ndarray]  # mu [D], sigma [D, D]


@dataclass
class Extractor:
    """A feature extractor of torch-fidelity on a device."""

    name: str
    weights_sha256: str | None  # None: torch-fidelity's own download, identified by its name and version
    layers: dict[str, str]  # metric -> layer
    net: torch.nn.Module
    device: torch.device
    batch_size: int

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor]) -> Features:
        """uint8 [b, C, H, W] batches of any size -> features of all their images, in order."""
        found: dict[str, list[Tensor]] = {layer: [] for layer in self.net.get_requested_features_list()}
        for images in batches:
            if images.dtype != torch.uint8:
                raise TypeError(f"features are extracted from uint8 images, not {images.dtype}")
            for part in images.split(self.batch_size):
                part = part.to(self.device)
                if part.shape[1] == 1 and self.name != classifier.NAME:
                    part = part.expand(-1, 3, -1, -1)  # torch-fidelity's extractors read RGB
                for layer, value in self.net.convert_features_tuple_to_dict(self.net(part)).items():
                    found[layer].append(value.float().cpu())
        return {layer: torch.cat(values) if values else torch.empty(0, 1) for layer, values in found.items()}

    def n_features(self, features: Features) -> int:
        """Dimensions of the layer that FID uses."""
        return features[self.layers["fid"]].shape[1]


def open_extractor(
    name: str, weights: str | None, metrics: list[str], batch_size: int, device: torch.device
) -> Extractor:
    """An extractor by name, with weights from a local file or torch-fidelity's own download.

    Raises:
        InputError: the weights are missing, damaged, of another network, or can't be downloaded; says what to do.
    """
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = {metric: cls.get_default_feature_layer_for_metric(metric) for metric in {*metrics, "fid"}}
    if weights is not None and name != classifier.NAME:  # that file is our own, and safetensors
        _check_weights(Path(weights))
    try:
        net = create_feature_extractor(
            name,
            sorted(set(layers.values())),
            cuda=device.type == "cuda",
            feature_extractor_weights_path=weights,
            verbose=False,
        )
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"the weights of {name} can't be downloaded ({error}): give a local file with "
            f"--feature_extractor_weights PATH, or use --feature_extractor {classifier.NAME}"
        ) from None
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{weights or name} does not hold the weights of {name}: {first}") from None
    if device.type == "cpu" and name != classifier.NAME:  # that one is small: nothing to gain
        net.to(memory_format=torch.channels_last)
    digest = sha256(Path(weights)) if weights is not None else None
    return Extractor(name, digest, layers, net, device, batch_size)


def _check_weights(path: Path) -> None:
    """Read the file safely first: torch-fidelity would unpickle anything."""
    if not path.is_file():
        raise InputError(f"--feature_extractor_weights {path}: no such file")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's many ways to say that a file is cut off or holds more than tensors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--feature_extractor_weights {path} can't be read as plain tensors: {first}") from None
    if not isinstance(weights, dict):
        raise InputError(f"--feature_extractor_weights {path} holds a {type(weights).__name__}, not named tensors")


def scores(
    metrics: list[str], extractor: Extractor, generated: Features, reference: Features, kid_subset_size: int,
    statistics: Statistics | None = None, cache_dir: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """The asked-for metrics of generated against reference features, named as in reports.

    statistics: of all reference images, for FID, where `reference` holds only some of their features.
    cache_dir: where what precision needs of the reference is kept.
    KID's subsets have kid_subset_size images, or as many as the smaller side has.
    """
    found: dict[str, float] = {}

    def pair(metric: str) -> tuple[Tensor, Tensor]:
        return generated[extractor.layers[metric]], reference[extractor.layers[metric]]

    if "fid" in metrics:
        layer = extractor.layers["fid"]
        found["fid"] = fid(generated[layer], reference[layer] if statistics is None else statistics)
    if "isc" in metrics:
        result = metric_isc.isc_features_to_metric(generated[extractor.layers["isc"]])
        found["isc"], found["isc_std"] = result["inception_score_mean"], result["inception_score_std"]
    if "kid" in metrics:
        size = min(kid_subset_size, *(len(side) for side in pair("kid")))
        result = metric_kid.kid_features_to_metric(*pair("kid"), kid_subset_size=size, verbose=False)
        found["kid"], found["kid_std"] = (result[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    if "prc" in metrics:
        found |= precision_recall(*pair("prc"), cache_dir)
    return found


def fid(generated: Tensor, reference: Tensor | Statistics) -> float:
    """Frechet distance between the Gaussians of two feature sets [N, D]; the second may be given by its statistics."""
    ours = metric_fid.fid_features_to_statistics(generated)
    theirs = reference if isinstance(reference, dict) else metric_fid.fid_features_to_statistics(reference)
    ours = {name: value.astype(theirs[name].dtype) for name, value in ours.items()}
    return metric_fid.fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]
