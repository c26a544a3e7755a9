"""Who is measured: each a module of generators, `train(work)` and so on, that do a unit of work per `next`.

A unit of `train` is one optimizer update, of `sample` one batch of images by `work.steps` steps of `work.sampler`, of
`evaluate` Inception's features of one batch of images. Each generator yields once before its first unit, when
everything is set up. They run in processes of their own (contestant.py).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

# name -> (module, its switches, what it is)
CONTESTANTS: dict[str, tuple[str, dict, str]] = {
    "ours": ("ours", {}, "train_ddpm.py and diffusions.generate at their defaults"),
    "ours, compiled": ("ours", {"compile": True}, "the same with train.compile, sample.compile true"),
    "diffusers": ("diffusers_example", {}, "its training example with --use_ema, DDIMPipeline: fp32, eager"),
    "diffusers, switches": (
        "diffusers_example",
        {"bf16": True, "channels_last": True, "foreach_ema": True, "workers": True},
        "the same with bf16 where it is native, channels_last, EMAModel(foreach), data workers on more than 2 cores",
    ),
    "diffusers, compiled": (
        "diffusers_example",
        {"bf16": True, "channels_last": True, "foreach_ema": True, "workers": True, "compile": True},
        "these and torch.compile",
    ),
    "lucidrains": ("lucidrains", {}, "denoising-diffusion-pytorch's Trainer and sampler"),
    "lucidrains, switches": (
        "lucidrains",
        {"bf16": True, "flash": True},
        "the same with amp in bf16, where it is native, and flash_attn",
    ),
    "plain loop": ("plain_loop", {}, "the DDIM authors' kind of loop: fp32, eager, their network"),
}

TASKS = ("train", "sample", "fixed-small", "evaluate")
SAMPLERS = {"sample": "ddim", "fixed-small": "fixed-small"}  # task -> sampler

EVALUATE = {  # contestant -> how it gets to Inception's features
    "ours": "ours",
    "diffusers": "torch-fidelity on PNGs",  # its documentation leaves scores to such tools
    "lucidrains": "lucidrains",
}


@dataclass(frozen=True)
class Preset:
    """The same network in every contestant's own implementation."""

    recipe: str  # ours
    image_size: int
    channels: int
    dim: int
    dim_mults: tuple[int, ...]
    attn_resolutions: tuple[int, ...]
    num_res_blocks: int
    norm_groups: int
    dropout: float
    batch_size: int
    lucidrains_dim: int  # the width at which its network does the same arithmetic, as nearly as it can

    def attends(self, level: int) -> bool:
        return self.image_size >> level in self.attn_resolutions


PRESETS = {
    "cifar10": Preset("ddpm_cifar10", 32, 3, 128, (1, 2, 2, 2), (16,), 2, 32, 0.1, 32, 152),
    "digits": Preset("ddpm_digits", 8, 1, 32, (1, 2, 2), (4,), 1, 8, 0.0, 128, 28),
}


@dataclass(frozen=True)
class Work:
    """What is asked of a contestant."""

    preset: Preset
    images: str  # a folder of PNGs to train on
    scratch: str  # a folder of its own
    batch_size: int
    sampler: str  # ddim or fixed-small
    steps: int  # of the sampler
    switches: dict
    device: torch.device

    def on(self, switch: str) -> bool:
        """bf16 only where the hardware multiplies it, workers only where there are cores for them."""
        from utils.precision import native_bf16

        pays = {"bf16": native_bf16, "workers": lambda: (os.cpu_count() or 1) > 2}.get(switch, lambda: True)
        return bool(self.switches.get(switch)) and pays()


def endless(loader):
    """Batch after batch, epoch after epoch."""
    while True:
        yield from loader


def forward_gflop(net, image_size: int, channels: int, call=lambda net, x, t: net(x, t)) -> float:
    """Of one image, as PyTorch's own counter sees it."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(net.parameters()).device
    x, t = (
        torch.zeros(1, channels, image_size, image_size, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(net, x, t)
    return round(counter.get_total_flops() / 1e9, 4)


def is_finite(value: float) -> float:
    """The loss of a unit of a loop that is written here: one that diverges has not done the work."""
    if not math.isfinite(value):
        raise RuntimeError("the loss is not finite")
    return value
