"""What the files of sample_ddpm.py show: its modes, the options that belong to each, and what each asks of the sampler.

Imports no torch: wrong combinations are told before any work.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass

from omegaconf import DictConfig

from utils.constraints import STOCHASTIC, drop_stored_eta
from utils.errors import InputError


@dataclass(frozen=True)
class Mode:
    """One way to show what a model does."""

    shows: str  # what a file holds
    options: tuple[str, ...] = ()  # command-line options that mean something here; others are refused
    needs: tuple[str, ...] = ()  # of these, those that must be given
    deterministic: bool = False  # x_T alone decides the image


MODES = {
    "sample": Mode("one image"),
    "denoise": Mode("a strip: x_t along the way, from the noise to the image", ("n_denoise", "animate")),
    "progressive": Mode("a strip: the prediction of x0 along the way", ("n_progressive", "animate")),
    "interpolate": Mode(
        "a row: from image 2i to image 2i + 1, along latents between theirs",
        ("n_interpolate", "corners", "source", "seed_to"),
        deterministic=True,
    ),
    "reconstruct": Mode(
        "source image i, and what DDIM decodes from its latent", ("source",), ("source",), deterministic=True
    ),
    "inpaint": Mode(
        "source image i, the known part of it, and the whole filled in",
        ("source", "mask", "n_resample"),
        ("source", "mask"),
    ),
    "consistency": Mode("a row: the same x_T under each count of --skip_steps", deterministic=True),
}
OWNED = dict.fromkeys(name for mode in MODES.values() for name in mode.options)
N_INTERPOLATE, N_RESAMPLE = 11, 10
STEP_COUNTS = (10, 20, 50, 100)  # and T


def check_options(options: argparse.Namespace, overrides: Collection[str], look_only: bool) -> None:
    """Raise InputError for options that do not belong to the mode, or that it lacks; fill in the mode's defaults.

    --skip_steps, a list, becomes one text, or the texts `step_counts` in mode consistency.
    overrides: dotted keys of the command line. look_only: nothing will be generated, so that nothing is missing.
    """
    mode = MODES[options.mode]
    for name in OWNED:
        if getattr(options, name) == "":
            raise InputError(f"--{name} is empty: wanted a path or a name")
        given = getattr(options, name) is not None and getattr(options, name) is not False
        if given and name not in mode.options:
            owners = " or ".join(other for other, entry in MODES.items() if name in entry.options)
            raise InputError(f"--{name} belongs to --mode {owners}, but the mode is {options.mode}")
        if getattr(options, name) is None and name in mode.needs and not look_only:
            raise InputError(f"--mode {options.mode} needs --{name} (--help explains)")
    if options.mode == "interpolate" and options.n_samples is not None:
        ends = 4 if options.corners else 2
        if options.n_samples % ends:
            what = "fewer than two images: " if options.n_samples < 2 else ""
            raise InputError(
                f"--n_samples {options.n_samples}: {what}images are interpolated {ends} at a time, "
                f"so wanted a multiple of {ends}"
            )
    if options.seed_to is not None and (options.corners or options.source):
        other = "corners" if options.corners else "source"
        raise InputError(f"--seed_to and --{other}: rows between two seeds have their ends in noise: give one of them")
    if options.n_interpolate == 1:
        raise InputError("--n_interpolate 1: wanted at least 2, the two ends")
    options.n_interpolate = options.n_interpolate or N_INTERPOLATE
    options.n_resample = options.n_resample or N_RESAMPLE
    scales, options.guidance_scales = options.guidance_scale or [], []
    if len(scales) > 1 and options.mode != "sample":
        raise InputError(f"--guidance_scale {' '.join(scales)}: several scales belong to --mode sample")
    if len(scales) > 1:
        options.guidance_scales = [_scale(text) for text in scales]
    options.guidance_scale = scales[0] if len(scales) == 1 else None
    if options.guidance_scales and "sample.guidance_scale" in overrides:
        raise InputError("--guidance_scale and --sample.guidance_scale are the same option: give one of them")
    counts = options.skip_steps or []
    if options.mode == "consistency":
        if "sample.skip_steps" in overrides:
            raise InputError("--sample.skip_steps: --mode consistency takes its counts from --skip_steps S1 S2 ...")
        options.step_counts, options.skip_steps = counts, None
    elif len(counts) > 1:
        raise InputError(
            f"--skip_steps {' '.join(counts)}: several counts belong to --mode consistency, "
            f"but the mode is {options.mode}"
        )
    else:
        options.skip_steps = counts[0] if counts else None


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = -1.0
    if not 0 <= scale < float("inf"):
        raise InputError(f"--guidance_scale {text}: wanted a number of at least 0")
    return scale


def adapt(config: DictConfig, options: argparse.Namespace, asked: Collection[str]) -> list[str]:
    """Make config.sample fit the mode and the sampler where nothing else was asked for; returns what to say of it.

    asked: dotted keys given on the command line or in its -c.

    Raises:
        InputError: what was asked for can't serve the mode.
    """
    mode, sample, notes = MODES[options.mode], config.sample, []
    if mode.deterministic and sample.sampler in STOCHASTIC:
        if "sample.sampler" in asked:
            raise InputError(
                f"--mode {options.mode} with the sampler {sample.sampler}, which draws noise: "
                "x_T alone must decide the image: use ddim, heun, dpm++2m or unipc"
            )
        notes.append(f"--mode {options.mode}: the sampler is ddim, because {sample.sampler} draws noise")
        sample.sampler = "ddim"
    if mode.deterministic and sample.eta > 0:
        if "sample.eta" in asked:
            raise InputError(f"--mode {options.mode} with eta = {sample.eta:g}: x_T alone must decide: use eta 0")
        notes.append(f"--mode {options.mode}: eta is 0, because x_T alone must decide the image")
        sample.eta = 0.0
    drop_stored_eta(config, asked)
    if options.mode == "consistency":
        sample.skip_steps = None  # it has its own
    return notes


def step_counts(options: argparse.Namespace, config: DictConfig) -> list[int]:
    """The columns of mode consistency, else the one count S. Raises InputError for a count that is none of 1 to T."""
    T = config.diffusion.total_steps
    if options.mode != "consistency":
        return [config.sample.skip_steps or T]
    for text in options.step_counts:
        if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= T:
            raise InputError(f"--skip_steps {text}: wanted 1 to {T}, the number of training timesteps")
    return [int(text) for text in options.step_counts] or [S for S in STEP_COUNTS if S < T] + [T]


def n_frames(options: argparse.Namespace, steps: int) -> int:
    """Frames per strip in modes denoise and progressive; 0 in the others. Raises InputError for more than `steps`."""
    if options.mode not in ("denoise", "progressive"):
        return 0
    asked = getattr(options, f"n_{options.mode}")
    if asked is not None and asked > steps:
        raise InputError(f"--n_{options.mode} {asked} is more than the {steps} sampling steps")
    return asked or min(20, steps)


def n_files(options: argparse.Namespace) -> int:
    """Files that n_samples images make."""
    per_file = 1 if options.mode != "interpolate" else 4 if options.corners else 2
    return options.n_samples // per_file
