"""A reference's statistics in one .npz: made once, used without its images; pytorch-fid's and EDM's files load too.

`mu` and `sigma` are of the layer that FID uses, so pytorch-fid reads the file as well; beside them a sample of features
for KID and precision/recall, and `about`: what was measured with what.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig

from utils.checkpoint import sha256, write_atomically
from utils.cli import say
from utils.errors import InputError

if TYPE_CHECKING:
    from utils.fidelity import Extractor, Features  # and torch-fidelity, which takes two seconds to import

FORMAT = 1
N_KEPT = 10_000  # features, evenly spaced over the images, for what needs more than the Gaussian
ASSUMED = "inception-v3-compat"  # of files that name no extractor; all publicly shared ones are of this network
GAUSSIAN = ("fid", "isc")  # the metrics that need no features of real images


@dataclass
class StoredReference:
    """What a file holds, in the place of `utils.reference.Reference`."""

    path: Path
    statistics: dict[str, np.ndarray]  # mu [D], sigma [D, D]
    features: Features
    about: dict[str, Any]  # empty: a file of another project
    train = test = None

    @property
    def images(self) -> StoredReference:
        return self

    @property
    def name(self) -> str:
        return self.about.get("name", self.path.stem)

    def __len__(self) -> int:
        """How many images were measured; without limit where the file does not say."""
        return self.about.get("n", 10**12)

    def __getitem__(self, i: int) -> torch.Tensor:
        """A black image of its shape: what an extractor makes of it has the right number of features."""
        size = self.about.get("size", 32)
        return torch.zeros(self.about.get("channels", 3), size, size, dtype=torch.uint8)

    def content_hash(self) -> str:
        return sha256(self.path)

    def check(self, options: DictConfig, size: int, channels: int) -> None:
        """Raise InputError where scores that are asked for can't be had from it."""
        own = self.about.get("extractor", ASSUMED)
        if options.feature_extractor != own:
            raise InputError(
                f"--reference {self.path} holds features of {own}, not of {options.feature_extractor}: "
                f"use --feature_extractor {own}, or make another with --make_reference"
            )
        if self.about and [self.about["size"], self.about["channels"]] != [size, channels]:
            raise InputError(
                f"--reference {self.path} is of {self.about['channels']} x {self.about['size']}^2 images, "
                f"those to score are {channels} x {size}^2"
            )
        if "bpd" in options.metrics:
            raise InputError(f"--reference {self.path}: the metric bpd needs images, not statistics")
        lacking = [metric for metric in options.metrics if metric not in GAUSSIAN and not self.features]
        if lacking:
            raise InputError(
                f"--reference {self.path} holds no features, only their mean and covariance: no {lacking[0]}; "
                f"use --metrics {' '.join(m for m in options.metrics if m in GAUSSIAN) or 'fid'}"
            )
        if not self.about:
            say(f"note: {self.path.name} does not say by which network its statistics are: taken as {ASSUMED}")

    def check_extractor(self, extractor: Extractor, dims: int) -> None:
        """Raise InputError for another network's features, or another weights file's."""
        held = self.about.get("extractor_weights_sha256")
        if self.about and held != extractor.weights_sha256:
            raise InputError(
                f"--reference {self.path} was made with other weights of {extractor.name} "
                f"(sha256 {str(held)[:12]}, here {str(extractor.weights_sha256)[:12]})"
            )
        if len(self.statistics["mu"]) != dims:
            raise InputError(
                f"--reference {self.path} is of {len(self.statistics['mu'])} features, {extractor.name} has {dims}"
            )


def load(path: Path) -> StoredReference:
    """Read a file of ours, or one that holds `mu` and `sigma`. Raises InputError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"--reference {path} can't be read as .npz: {str(error).splitlines()[0]}") from None
    try:
        mu, sigma = held["mu"], held["sigma"]
        about = json.loads(str(held["about"])) if "about" in held else {}
        features = {
            name.removeprefix("features_"): torch.from_numpy(rows)
            for name, rows in held.items()
            if name.startswith("features_")
        }
        whole = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and mu.dtype.kind == sigma.dtype.kind == "f"
        if not whole or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mu and sigma are not a finite mean and its covariance")
        if about and (about["format"] != FORMAT or not about["n"] or not about["extractor"]):
            raise ValueError(f"format {about['format']}, wanted {FORMAT}")
        if about and not all(isinstance(about[name], int) for name in ("n", "size", "channels")):
            raise ValueError("sizes are not numbers")
    except (KeyError, ValueError, TypeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"--reference {path} holds no statistics that can be used: {what}") from None
    return StoredReference(path, {"mu": mu, "sigma": sigma}, features, about)


def save(path: Path, reference, features: Features, extractor: Extractor, size: int, channels: int) -> None:
    """Write the statistics of a `Reference` whose features these are."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    from utils.protocol import versions

    n = len(reference.images)
    rows = torch.arange(min(n, N_KEPT)) * n // min(n, N_KEPT)
    about = {
        "format": FORMAT,
        "name": reference.name,
        "n": n,
        "size": size,
        "channels": channels,
        "images_sha256": reference.images.content_hash(),
        "extractor": extractor.name,
        "extractor_weights_sha256": extractor.weights_sha256,
        "n_features_kept": len(rows),
        "versions": versions(),
    }
    held = fid_features_to_statistics(features[extractor.layers["fid"]])
    held |= {f"features_{layer}": value[rows].numpy() for layer, value in features.items()}
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(place: Path) -> None:
        with open(place, "wb") as file:  # given a name, numpy would add its suffix
            np.savez(file, about=json.dumps(about), **held)

    write_atomically(path, write)
