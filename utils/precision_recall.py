"""Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) with the balls of real features kept on disk.

torch-fidelity's own distances in its own parts, so that the numbers are its numbers to the bit; it measures the balls
of the real side again for every set of images, which is nearly all of the time where there are 60,000 of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.metric_prc import calc_cdist_part

from utils.checkpoint import write_atomically

NEIGHBOR, PART = 3, 10_000  # torch-fidelity's defaults


def precision_recall(generated: Tensor, real: Tensor, cache_dir: Path | None = None) -> dict[str, float]:
    """Features [N, D] and [M, D] -> precision, recall and f_score, in 0..1; cache_dir: where real balls are kept."""
    precision = _share_inside(generated, real, _cached_radii(real, cache_dir))
    recall = _share_inside(real, generated, radii(generated))
    f_score = 2 * precision * recall / max(1e-5, precision + recall)
    return {"precision": precision, "recall": recall, "f_score": f_score}


def radii(features: Tensor) -> Tensor:
    """[N]: each feature's distance to its third nearest neighbour."""
    parts = features.split(PART)
    return torch.cat([calc_cdist_part(part, features, PART).kthvalue(NEIGHBOR + 1).values for part in parts])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """How many of the points lie in at least one ball."""
    parts = points.split(PART)
    return torch.cat([(calc_cdist_part(part, centres, PART) <= radii).any(1).float() for part in parts]).mean().item()


def _cached_radii(features: Tensor, cache_dir: Path | None) -> Tensor:
    if cache_dir is None:
        return radii(features)
    content = hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
    path = cache_dir / f"radii-{NEIGHBOR}-{content[:20]}.safetensors"
    try:
        found = load_file(path)["radii"]
        if len(found) == len(features):
            return found
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or damaged: made again
    found = radii(features)
    cache_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda place: save_file({"radii": found}, place))
    return found
