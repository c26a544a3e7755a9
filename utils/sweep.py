"""What an evaluation covers: every combination of the samplers, skip types, step counts and etas asked for."""

from __future__ import annotations

import argparse
import itertools

from utils import config
from utils.constraints import TAKES_ETA
from utils.errors import InputError

AXES = {  # option -> the key that it sweeps over
    "samplers": "sample.sampler",
    "skip_types": "sample.skip_type",
    "skip_steps": "sample.skip_steps",
    "etas": "sample.eta",
}


def check_axes(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Raise InputError for an axis that is also given as a dotted key."""
    for name, dotted in AXES.items():
        if getattr(options, name) and dotted in overrides:
            raise InputError(f"--{name} and --{dotted} are the same option: give one of them")


def cells(options: argparse.Namespace, asked: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
    """Every combination of the values asked for, each as overrides; few steps, the cheap ones, first.

    A sampler that ignores eta has one cell, not one per eta. Raises InputError for an illegal value.
    """
    axes = {name: getattr(options, name) for name in AXES if getattr(options, name)}
    found = []
    for values in itertools.product(*axes.values()):
        cell = {AXES[name]: value for name, value in zip(axes, values)}
        sampler = config.merge(*asked, ("the sweep", cell)).sample.sampler
        if "samplers" in axes and "etas" in axes and sampler not in TAKES_ETA:
            del cell[AXES["etas"]]
        if cell not in found:
            found.append(cell)
    return sorted(found, key=lambda cell: steps_of(cell["sample.skip_steps"]) if "sample.skip_steps" in cell else 0)


def steps_of(text: str) -> float:
    """A step count for sorting; null, all T of them, comes last."""
    return int(text) if text.isdigit() else float("inf")
