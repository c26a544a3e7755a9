"""Bits per dimension of a data set under a network's variational bound: an evaluation without generated images."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from diffusions import GaussianDiffusion, build_process, time_grid
from diffusions.generate import denoiser
from diffusions.likelihood import CHAINS, bound_terms
from diffusions.noise import randn
from diffusions.pixels import to_unit
from diffusions.samplers import Denoise
from utils import precision
from utils.captions import Asked
from utils.cli import say
from utils.data.batches import decoded
from utils.data.image_set import ImageSet
from utils.distributed import share
from utils.errors import InputError, RankError
from utils.protocol import circumstances, sampling_identity
from utils.results import cell_id
from utils.weights import load_network


def chains(samplers: list[str], learn_variance: bool) -> list[str]:
    """The samplers among those asked for whose chain has a bound; where there is none, the network's own."""
    return [name for name in dict.fromkeys(samplers) if name in CHAINS] or [
        "learned-range" if learn_variance else "fixed-small"
    ]


def bound_row(
    accelerator, config: DictConfig, weights, seed: int, micro_batch: int | None, images: ImageSet, chain: str, known
) -> dict | None:
    """A row of the results: bits per dimension of at most evaluate.n_samples of the images, evenly spaced among them.

    The chain is the full one of T steps. known(id) says whether the row is there already; then None. A collective.

    Raises:
        RankError: an image that can't be read.
    """
    if config.model.condition != "none":
        raise InputError("the metric bpd is not there for conditional networks: leave it out of --metrics")
    n = min(config.evaluate.n_samples, len(images))
    precision_name = precision.mixed_precision(config.sample.mixed_precision)
    config = config.copy()
    config.sample.sampler, config.sample.skip_steps, config.sample.eta = chain, None, 0.0
    process = build_process(config.diffusion)
    protocol = {
        "source": sampling_identity(weights, config, process, seed, precision_name, Asked("none")),
        "n": n,
        "reference": images.name,
        "reference_sha256": images.content_hash(),
        "extractor_weights_sha256": None,
        "metrics": ["bpd"],
    }
    label = f"{chain}, bound of {process.total_steps} terms; {weights.origin} ({weights.kind}), seed {seed}"
    if known(cell_id(protocol)):
        say(f"{label}: already there")
        return None
    say(f"bpd, {chain}: {n:,} images of {images.name}, {process.total_steps} network evaluations each")
    rows = torch.arange(n) * len(images) // n
    dtype = precision.DTYPES[precision_name]
    net = load_network(weights, accelerator.device, dtype)
    denoise = denoiser(net, process, config.sample.clip_denoised, dtype)
    chosen = images.subset(rows, images.name)
    terms, spread = mean_terms(accelerator, denoise, process, chosen, rows, seed, CHAINS[chain], micro_batch)
    return {
        "id": cell_id(protocol),
        "label": label,
        "reference": images.name,
        "extractor": None,
        "n": n,
        "scores": {"bpd": sum(terms), "bpd_std": spread, "bpd_prior": terms[-1], "bpd_decoder": terms[-2]},
        "floor": None,
        "terms": {"t": list(reversed(range(process.total_steps))), "bits": terms[:-1], "prior": terms[-1]},
        "seconds_per_image": None,
        "protocol": protocol,
        "circumstances": circumstances(weights, accelerator),
    }


def mean_terms(
    accelerator, denoise: Denoise, process: GaussianDiffusion, images: ImageSet, indices: Tensor, seed: int,
    variance: str, micro_batch: int | None,
) -> tuple[list[float], float]:  # fmt: skip
    """The bound's T + 1 terms, means over the images, and the standard error of their sum [bits per dimension].

    indices [N]: what the noise of the images is a function of, besides the seed. Split over processes; a collective.
    """
    grid, device = time_grid(process.alpha_bar, "uniform", None), accelerator.device
    hidden = not accelerator.is_main_process
    mine = share(len(images), accelerator.process_index, accelerator.num_processes)
    try:
        pixels = torch.cat(list(decoded(images.subset(mine, images.name)))) if len(mine) else torch.empty(0)
    except InputError as error:
        raise RankError(str(error)) from None
    total, squares = torch.zeros(len(grid) + 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    parts = torch.arange(len(mine)).split(micro_batch or 128) if len(mine) else ()
    with tqdm(total=len(parts) * len(grid), desc="bpd", unit="eval", file=sys.stderr, disable=hidden) as bar:
        for part in parts:
            draw = counted_draws(seed, indices[mine[part]], pixels.shape[1:], device, bar)
            found = bound_terms(denoise, to_unit(pixels[part].to(device)), grid, variance, draw).cpu()
            total, squares = total + found.sum(1), squares + found.sum(0).square().sum()
    total, squares = (_sum(accelerator, value) for value in (total, squares))
    n = len(images)
    spread = max(squares.item() / n - (total.sum().item() / n) ** 2, 0.0) / max(n - 1, 1)
    return (total / n).tolist(), spread**0.5


def counted_draws(seed: int, indices: Tensor, shape, device, bar: tqdm) -> Callable[[], Tensor]:
    """randn() of one batch that moves the bar at every draw, which is every network evaluation."""
    draws = iter(range(2**32))

    def draw() -> Tensor:
        bar.update()
        return randn(seed, indices, next(draws), tuple(shape), device)

    return draw


def _sum(accelerator, value: Tensor) -> Tensor:
    if accelerator.num_processes == 1:
        return value
    return accelerator.reduce(value.to(accelerator.device), "sum").cpu()
