"""From an image to the x_T that DDIM turns into it."""

import torch
from torch import Tensor

from diffusions.samplers import Denoise
from diffusions.schedules import TimeGrid


@torch.no_grad()
def encode(denoise: Denoise, x0: Tensor, grid: TimeGrid) -> Tensor:
    """x_0 -> x at the grid's first timestep: DDIM's ODE from the data to the noise by Euler (Song et al. 2021, eq. 14).

    x0 [B, C, H, W] in [-1, 1]. The network knows no alpha_bar = 1: there it is asked at the grid's lowest timestep.
    Clip its x0 as in decoding, preferably: where alpha_bar_T is tiny, eps alone does not determine x0 again.
    """
    x, lowest = x0, grid.t[-2].item()
    for _, t_prev, ab, ab_prev in reversed(list(grid)):  # from t_prev up to t
        eps = denoise(x, t_prev if ab_prev < 1 else lowest).eps
        signal = (ab / ab_prev) ** 0.5
        x = signal * x + ((1 - ab) ** 0.5 - signal * (1 - ab_prev) ** 0.5) * eps
    return x
