"""What an evaluation covers: every combination of the samplers, skip types, step counts and etas asked for."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig

from utils import config
from utils.constraints import TAKES_ETA, drop_stored_eta
from utils.errors import InputError

AXES = {  # option -> the key that it sweeps over
    "samplers": "sample.sampler",
    "skip_types": "sample.skip_type",
    "skip_steps": "sample.skip_steps",
    "etas": "sample.eta",
    "guidance_scales": "sample.guidance_scale",
}


def check_axes(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Raise InputError for an axis that is also given as a dotted key, or for what a folder of images has not."""
    for name, dotted in AXES.items():
        if getattr(options, name) and dotted in overrides:
            raise InputError(f"--{name} and --{dotted} are the same option: give one of them")
    of_weights = ["n_samples"] * ("evaluate.n_samples" in overrides) + ["repeats"] * (options.repeats > 1)
    of_weights += [name for name in ("store", "per_class", *AXES) if getattr(options, name)]
    if options.images and of_weights:
        raise InputError(f"--{of_weights[0]} goes with --weights: a folder is scored as it is")


def cells(options: argparse.Namespace, asked: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
    """Every combination of the values asked for, each as overrides; few steps, the cheap ones, first.

    A sampler that ignores eta has one cell, not one per eta. Raises InputError for an illegal value.
    """
    axes = {name: getattr(options, name) for name in AXES if getattr(options, name)}
    for name, values in axes.items():
        for value in values:
            config.merge(*asked, (f"--{name}", {AXES[name]: value}))
    samplers = [config.merge(("", {"sample.sampler": name})).sample.sampler for name in axes.get("samplers", [])]
    if "etas" in axes and samplers and not set(samplers) & set(TAKES_ETA):
        raise InputError(f"--etas: none of the samplers {', '.join(samplers)} takes eta; it belongs to ddim")
    found = []
    for values in itertools.product(*axes.values()):
        cell = {AXES[name]: value for name, value in zip(axes, values)}
        sampler = config.merge(*asked, ("", cell)).sample.sampler
        if "samplers" in axes and "etas" in axes and sampler not in TAKES_ETA:
            del cell[AXES["etas"]]
        if cell not in found:
            found.append(cell)
    return sorted(found, key=lambda cell: steps_of(cell["sample.skip_steps"]) if "sample.skip_steps" in cell else 0)


def apply(base: DictConfig, cell: dict[str, str], asked: Collection[str]) -> DictConfig:
    """The cell's configuration; asked: dotted keys of the command line."""
    found = config.merge(("the sweep", cell), base=base)
    drop_stored_eta(found, {*asked, *cell})
    return found


def repeat(
    options: argparse.Namespace, cell: DictConfig, seed: int, row: dict[str, Any], data_keys: dict[str, Any]
) -> list[str]:
    """The command line that computes this one row again; what its numbers do not depend on is left out."""
    words = ["--reference", options.reference, "--seed", str(seed)]
    given = {name: getattr(options, name) for name in ("config", "weights", "images", "load_ema", "micro_batch")}
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    words += ["--force"] * options.force + ["--per_class"] * options.per_class
    keys = dict(data_keys) | {f"evaluate.{name}": value for name, value in cell.evaluate.items()}
    keys["evaluate.metrics"] = f"[{','.join(row['protocol']['metrics'])}]"
    if options.weights is not None:
        keys |= {f"sample.{name}": value for name, value in cell.sample.items()}
        if cell.sample.sampler not in TAKES_ETA:
            del keys["sample.eta"]
        keys["evaluate.n_samples"] = row["n"]
    else:
        del keys["evaluate.n_samples"]
    return words + [f"--{name}={'null' if value is None else value}" for name, value in keys.items()]


def steps_of(text: str) -> float:
    """A step count for sorting; null, all T of them, comes last."""
    return int(text) if text.isascii() and text.isdigit() else float("inf")
