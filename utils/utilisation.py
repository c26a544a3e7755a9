"""How much of the machine's arithmetic a training uses."""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from models import build_model
from models.flops import forward_flops

AFTER = 30.0  # seconds of training before the machine is measured, so that a short run does not pay for it
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices whose product is timed


def network_flops(config: DictConfig) -> int:
    """Operations of one forward pass of one image through the network that is configured."""
    with torch.device("meta"):
        net = build_model(config.model, config.data.image_size, config.data.channels, config.diffusion.learn_variance)
    return forward_flops(net)


def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """Operations per second of a large matrix product in `dtype` (None: float32), the best of four."""
    n = SIDE.get(device.type, SIDE["cpu"])
    a, best = torch.randn(n, n, device=device).to(dtype or torch.float32), float("inf")
    for _ in range(5):  # the first warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class Utilisation:
    """MFU (Chowdhery et al. 2022, appendix B): the operations that training needs over what matrix products reach.

    A step counts three forward passes, whatever is recomputed. Measured once, after AFTER seconds.
    """

    def __init__(self, config: DictConfig, accelerator: Accelerator) -> None:
        self.config, self.device, self.world = config, accelerator.device, accelerator.num_processes
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.started, self.images_per_second = time.monotonic(), None  # the latter at a utilisation of 1

    def __call__(self, images_per_second: float) -> dict[str, float]:
        """{"mfu": 0 to 1} for a rate over all processes; nothing in the first AFTER seconds."""
        if self.images_per_second is None:
            if time.monotonic() - self.started < AFTER:
                return {}
            try:
                rate = matmul_rate(self.device, self.dtype)
            except torch.cuda.OutOfMemoryError:  # the network needs it more
                rate = float("nan")
            self.images_per_second = self.world * rate / (3 * network_flops(self.config))
        mfu = images_per_second / self.images_per_second
        return {} if math.isnan(mfu) else {"mfu": round(mfu, 4)}
