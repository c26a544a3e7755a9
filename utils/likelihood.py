"""Bits per dimension of a data set under a network's variational bound: an evaluation without generated images."""

from __future__ import annotations

import sys

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from diffusions import build_process, time_grid
from diffusions.generate import denoiser
from diffusions.likelihood import CHAINS, bound_terms
from diffusions.noise import randn
from diffusions.pixels import to_unit
from utils import precision
from utils.cli import say
from utils.data.image_set import ImageSet
from utils.distributed import share
from utils.protocol import circumstances, sampling_identity
from utils.results import cell_id
from utils.weights import load_network


def chains(samplers: list[str], learn_variance: bool) -> list[str]:
    """The samplers among those asked for whose chain has a bound; where there is none, the network's own."""
    return [name for name in dict.fromkeys(samplers) if name in CHAINS] or [
        "learned-range" if learn_variance else "fixed-small"
    ]


def bound_row(accelerator, config: DictConfig, weights, options, images: ImageSet, chain: str, known) -> dict | None:
    """A row of the results: bits per dimension of at most evaluate.n_samples of the images, evenly spaced among them.

    The chain is the full one of T steps. known(id) says whether the row is there already; then None. A collective.
    """
    n, dtype_name = (
        min(config.evaluate.n_samples, len(images)),
        precision.mixed_precision(config.sample.mixed_precision),
    )
    config = config.copy()
    config.sample.sampler, config.sample.skip_steps, config.sample.eta = chain, None, 0.0
    process = build_process(config.diffusion)
    protocol = {
        "source": sampling_identity(weights, config, process, options.seed, dtype_name),
        "n": n,
        "reference": images.name,
        "reference_sha256": images.content_hash(),
        "extractor_weights_sha256": None,
        "metrics": ["bpd"],
    }
    label = f"{chain}, bound of {process.total_steps} terms; {weights.file.parent.name} ({weights.kind})"
    identity = cell_id(protocol)
    if known(identity):
        say(f"{label}: already there")
        return None
    net = load_network(weights, accelerator.device)
    grid = time_grid(process.alpha_bar, "uniform", None)
    denoise = denoiser(net, process, config.sample.clip_denoised, precision.DTYPES[dtype_name])
    say(f"bpd, {chain}: {n:,} images of {images.name}, {process.total_steps} network evaluations each")
    rows = torch.arange(n) * len(images) // n
    total, squares = torch.zeros(len(grid) + 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mine = share(n, accelerator.process_index, accelerator.num_processes)
    with tqdm(total=len(mine), desc="bpd", unit="img", file=sys.stderr, disable=not accelerator.is_main_process) as bar:
        for part in mine.split(options.micro_batch or 128):
            x0 = to_unit(torch.stack([images[i] for i in rows[part].tolist()]).to(accelerator.device))
            draws = iter(range(2**32))
            noise = lambda: randn(options.seed, rows[part], next(draws), tuple(x0.shape[1:]), x0.device)
            found = bound_terms(denoise, x0, grid, CHAINS[chain], noise).cpu()
            total, squares = total + found.sum(1), squares + found.sum(0).square().sum()
            bar.update(len(part))
    total, squares = (_sum(accelerator, value) for value in (total, squares))
    terms, mean = (total / n).tolist(), total.sum().item() / n
    spread = max(squares.item() / n - mean**2, 0.0) ** 0.5 / n**0.5
    return {
        "id": identity,
        "label": label,
        "reference": images.name,
        "extractor": None,
        "n": n,
        "scores": {"bpd": mean, "bpd_std": spread, "bpd_prior": terms[-1], "bpd_decoder": terms[-2]},
        "floor": None,
        "terms": {"t": grid.t[:-1].tolist(), "bits": terms[:-1], "prior": terms[-1]},
        "seconds_per_image": None,
        "protocol": protocol,
        "circumstances": circumstances(weights, accelerator),
    }


def _sum(accelerator, value: Tensor) -> Tensor:
    if accelerator.num_processes == 1:
        return value
    return accelerator.reduce(value.to(accelerator.device), "sum").cpu()
