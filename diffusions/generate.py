"""From indices to images: one lazy iterable for the PNG writer, the scores and the training previews."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusions.cuda_graph import Graphed
from diffusions.guidance import UNGUIDED, Guidance, guided
from diffusions.noise import randn
from diffusions.pixels import to_uint8
from diffusions.process import GaussianDiffusion, Prediction
from diffusions.samplers import SAMPLERS, Denoise, Randn, Step
from diffusions.schedules import TimeGrid, time_grid
from diffusions.transfer import on


class Batch(NamedTuple):
    """Generated images; image i is a function of (weights, options, seed, i)."""

    indices: Tensor  # [b] int64, which images these are
    images: Tensor  # [b, C, H, W] uint8, on the CPU
    frames: Tensor | None = None  # [b, F, C, H, W] uint8, moments along the way, from the noise to the data


# indices [b] -> the network's conditions, one row each; None: no condition
Conditions = Callable[[Tensor], dict[str, Tensor] | None]

# (sampler, denoise, indices [b], grid, randn) -> steps: where images start, and how the sampler takes them on.
Walk = Callable[[Callable[..., Iterator[Step]], Denoise, Tensor, TimeGrid, Randn], Iterator[Step]]


def from_noise(sampler, denoise: Denoise, indices: Tensor, grid: TimeGrid, randn: Randn) -> Iterator[Step]:
    """The plain walk: x_T is each image's first draw."""
    return sampler(denoise, randn(), grid, randn)


def denoiser(
    model: nn.Module,
    process: GaussianDiffusion,
    clip: bool,
    dtype: torch.dtype | None = None,
    cond: dict[str, Tensor] | None = None,
    guidance: Guidance = UNGUIDED,
) -> Denoise:
    """`denoise(x, t)` that samplers call: the network (autocast to dtype, if any), guidance, objective and clipping."""
    network = guided(model, cond, guidance, process.alpha_bar)

    def denoise(x: Tensor, t: int) -> Prediction:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            out = network(x, t)
        return process.predict(out.to(x.dtype), x, t, clip)

    return denoise


def guidance_of(options) -> Guidance:
    """The guidance that sampling options (the config's sample section) describe; those without any are unguided."""
    interval = getattr(options, "guidance_interval", None)
    return Guidance(
        getattr(options, "guidance_scale", 1.0),
        getattr(options, "guidance_rescale", 0.0),
        tuple(interval) if interval else None,
    )


@torch.no_grad()
def trajectory(
    model: nn.Module,
    process: GaussianDiffusion,
    options,
    indices: Tensor,
    seed: int,
    cond: dict | None = None,
    dtype: torch.dtype | None = None,
    walk: Walk = from_noise,
) -> Iterator[Step]:
    """Every step of the images `indices` [b], as one batch. Arguments as in `generate`."""
    device = next(model.parameters()).device
    shape = (model.in_channels, model.image_size, model.image_size)
    draws, which = iter(range(2**32)), on(indices, device)

    def next_draw() -> Tensor:
        return randn(seed, which, next(draws), shape, device)

    grid = time_grid(process.alpha_bar, options.skip_type, options.skip_steps)
    cond, guidance = {name: value.to(device) for name, value in (cond or {}).items()}, guidance_of(options)
    if not cond and getattr(model, "condition", None) is not None:  # encoded once and in full precision, as guided's is
        cond, guidance = model.null(len(indices)), UNGUIDED
    denoise = denoiser(model, process, options.clip_denoised, dtype, cond, guidance)
    sampler = partial(SAMPLERS[options.sampler], eta=options.eta)
    yield from walk(sampler, denoise, indices, grid, next_draw)


def generate(
    model: nn.Module,
    process: GaussianDiffusion,
    options,
    indices: Sequence[int] | Tensor,
    seed: int,
    micro_batch: int,
    cond: dict[str, Tensor] | Conditions | None = None,
    dtype: torch.dtype | None = None,
    n_frames: int = 0,
    view: str = "x",
    walk: Walk = from_noise,
    fill: bool = False,
) -> Iterator[Batch]:
    """Generate the images `indices`, `micro_batch` at a time.

    Args:
        model: network with in_channels and image_size; in eval mode, else dropout acts.
        process: the diffusion it was trained for.
        options: has sampler, skip_type, skip_steps (None: all), eta and clip_denoised, and may have
            guidance_scale, guidance_rescale and guidance_interval: the config's sample section.
        indices: which images; image i does not depend on which others are asked for.
        seed: the seed of all noise.
        micro_batch: images per forward pass; does not change the noise, nor the images beyond rounding.
        cond: conditioning of the network, one row per index, or a function of indices [b] that gives their rows; None:
            the unconditional network, guided or not.
        dtype: autocast precision of the network; None: float32.
        n_frames: also return that many moments along the way, evenly spaced, the last one the image.
        view: what frames show: "x" (x_t) or "x0" (its prediction).
        walk: where the images start and how the sampler takes them on; the default starts at noise.
        fill: other calls have whole micro-batches of that size, so that an only one is filled up to it as well.

    For a compiled network the last micro-batch is filled up to the size of the others, and what fills it is dropped.

    Raises:
        ValueError: an unknown sampler or skip type, skip_steps outside 1..T, more frames than steps, a sampler that
            needs a learned variance without one.
    """
    if options.sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {options.sampler!r}; the samplers are {', '.join(SAMPLERS)}")
    if SAMPLERS[options.sampler].needs_variance and not process.learn_variance:
        raise ValueError(f"{options.sampler} needs a network that predicts its variance")
    steps = len(time_grid(process.alpha_bar, options.skip_type, options.skip_steps))
    if n_frames > steps:
        raise ValueError(f"{n_frames} frames were asked of {steps} sampling steps")
    kept = frame_steps(steps, n_frames)
    indices = torch.as_tensor(indices, dtype=torch.int64)
    model = Graphed(model, steps * -(-len(indices) // micro_batch))
    fill = is_compiled(model) and (fill or len(indices) > micro_batch)
    for rows in torch.arange(len(indices)).split(micro_batch) if len(indices) else ():
        n = len(rows)
        if fill and n < micro_batch:
            rows = torch.cat([rows, rows[-1:].expand(micro_batch - n)])
        chosen = indices[rows]
        if callable(cond):
            rows_cond = cond(chosen)
        else:
            rows_cond = {name: value[rows.to(value.device)] for name, value in (cond or {}).items()}
        frames = []
        for i, step in enumerate(trajectory(model, process, options, chosen, seed, rows_cond, dtype, walk)):
            if i in kept:
                frames.append(to_uint8(getattr(step, view)[:n]).cpu())
        images = to_uint8(step.x[:n]).cpu()
        yield Batch(chosen[:n], images, torch.stack(frames, dim=1) if frames else None)


def is_compiled(model: nn.Module) -> bool:
    """Whether a network was compiled in place."""
    return getattr(model, "_compiled_call_impl", None) is not None


def frame_steps(steps: int, n_frames: int) -> list[int]:
    """Which of 0..steps-1 are shown: n_frames of them, evenly spaced, strictly ascending, the last one included."""
    return [(i + 1) * steps // n_frames - 1 for i in range(n_frames)]
