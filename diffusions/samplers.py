"""Samplers: each a generator function that walks a TimeGrid from the noise to the data, yielding every step.

A sampler knows only `denoise(x, t) -> Prediction`; the objective, clipping and guidance live behind it. The last step
reaches alpha_bar = 1: it is of first order in all of them, x0 itself, without noise. New sampler = one function and one
line in SAMPLERS.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffusions.posterior import posterior
from diffusions.process import Prediction
from diffusions.schedules import TimeGrid, half_log_snr

Denoise = Callable[[Tensor, int], Prediction]  # (x_t [B, C, H, W], t) -> what the network says
Randn = Callable[[], Tensor]  # the next [B, C, H, W] standard normal draw of this batch


class Step(NamedTuple):
    """One step of a sampler."""

    t: int  # the timestep that was left
    x: Tensor  # [B, C, H, W], x at the next timestep of the grid; the image after the last step
    x0: Tensor  # [B, C, H, W], the prediction of x0 made at t


def ancestral(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn, *, variance: str) -> Iterator[Step]:
    """DDPM (Ho et al. 2020, algorithm 2 and eq. 7) on the respaced chain, beta_t = 1 - alpha_bar_t / alpha_bar_prev.

    variance: "large", sigma^2 = beta_t, or "small", the posterior variance (section 3.2), or "learned", between the two
    in log space by the network's own fraction (Nichol and Dhariwal 2021, eq. 15).
    """
    for t, _, ab, ab_prev in grid:
        large = 1 - ab / ab_prev
        of_x0, of_x, small = posterior(ab, ab_prev)
        x0, _, var_frac = denoise(x, t)
        x = of_x0 * x0 + of_x * x
        if ab_prev < 1:
            sigma2 = {"large": large, "small": small}.get(variance)
            x = x + (small * (large / small) ** var_frac if sigma2 is None else sigma2) ** 0.5 * randn()
        yield Step(t, x, x0)


def ddim(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn, *, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta = 0 is deterministic, eta = 1 has DDPM's posterior variance."""
    for t, _, ab, ab_prev in grid:
        x0, eps, _ = denoise(x, t)
        sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)) ** 0.5
        x = ab_prev**0.5 * x0 + max(1 - ab_prev - sigma**2, 0.0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * randn()
        yield Step(t, x, x0)


NO_SIGNAL = 1e-7  # alpha_bar below which Heun's average, times a sigma above 3,000, is all model error


def heun(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn) -> Iterator[Step]:
    """Heun's second-order method (Karras et al. 2022, algorithm 1) on DDIM's ODE (Song et al. 2021, eq. 14).

    That ODE is d(x / sqrt(alpha_bar)) = eps d(sigma) with sigma = sqrt((1 - alpha_bar) / alpha_bar); its Euler step is
    DDIM's. Steps to the data, and from where sigma is infinite or enormous (the cosine schedule's end), are Euler's.
    """
    for t, t_prev, ab, ab_prev in grid:
        x0, eps, _ = denoise(x, t)
        euler = ab_prev**0.5 * x0 + (1 - ab_prev) ** 0.5 * eps
        if ab > NO_SIGNAL and ab_prev < 1:
            sigma, sigma_prev = ((1 - ab) / ab) ** 0.5, ((1 - ab_prev) / ab_prev) ** 0.5
            eps_prev = denoise(euler, t_prev).eps
            x = ab_prev**0.5 * (x / ab**0.5 + (sigma_prev - sigma) * (eps + eps_prev) / 2)
        else:
            x = euler
        yield Step(t, x, x0)


def dpmpp_2m(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), multistep in lambda = log(alpha / sigma)."""
    lambdas, x0_last = half_log_snr(grid.alpha_bar).tolist(), None
    for i, (t, _, ab, ab_prev) in enumerate(grid):
        x0 = denoise(x, t).x0
        h = lambdas[i + 1] - lambdas[i]
        target = x0
        if x0_last is not None and ab_prev < 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            target = x0 + (x0 - x0_last) / (2 * r)
        x = ((1 - ab_prev) / (1 - ab)) ** 0.5 * x - ab_prev**0.5 * math.expm1(-h) * target
        x0_last = x0
        yield Step(t, x, x0)


def unipc(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn) -> Iterator[Step]:
    """UniPC of order 2 (Zhao et al. 2023, algorithms 1 and 2 with B(h) = e^h - 1), multistep, predicting x0.

    The network's evaluation at the end of a step first corrects that step (UniC-2), then drives the next one (UniP-2).
    """
    lambdas = half_log_snr(grid.alpha_bar).tolist()
    euler = x0_last = slope = x  # of the step before: not read at the first
    weight = h = h_last = 0.0
    for i, (t, _, ab, ab_prev) in enumerate(grid):
        x0 = denoise(x, t).x0
        if i > 0:
            change = x0 - x0_last
            of_slope, of_change = (0.0, 0.5) if i == 1 else unic_weights(h, h_last)
            x = euler + weight * (of_slope * slope + of_change * change)
        h_last, h = h, lambdas[i + 1] - lambdas[i]
        slope = change * (h / h_last) if i > 0 and ab_prev < 1 else torch.zeros_like(x)  # of x0 over the coming step
        weight = -(ab_prev**0.5) * math.expm1(-h)
        euler = ((1 - ab_prev) / (1 - ab)) ** 0.5 * x + weight * x0
        x, x0_last = euler + weight * slope / 2, x0
        yield Step(t, x, x0)


def unic_weights(h: float, h_last: float) -> tuple[float, float]:
    """UniC-2's weights of the slope over the past step and of the change over this one (its theorem 3.1, solved)."""
    phi_1 = math.expm1(-h)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 1 / 2
    of_slope = (phi_2 - 2 * phi_3) / phi_1 / (1 + h_last / h)
    return of_slope, phi_2 / phi_1 - of_slope


@dataclass(frozen=True)
class Sampler:
    """A sampler and what the command line, the tables and the tests need to know of it.

    Calling it: `sampler(denoise, x_T, grid, randn, **options) -> Iterator[Step]`.
    """

    fn: Callable[..., Iterator[Step]]
    order: int  # of convergence in the number of steps
    evals_per_step: int  # network evaluations; the last step, of first order, takes one
    stochastic: bool  # draws noise at its default options
    takes_eta: bool = False
    needs_variance: bool = False  # works only with a network that predicts its variance

    def evaluations(self, S: int) -> int:
        """Network evaluations of S steps to the data; heun's steps from below NO_SIGNAL take one less."""
        return (S - 1) * self.evals_per_step + 1

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn, eta: float = 0.0, **options
    ) -> Iterator[Step]:
        if self.takes_eta:
            options["eta"] = eta
        elif eta:
            raise ValueError(f"eta = {eta:g} was given to a sampler that ignores it")
        return self.fn(denoise, x, grid, randn, **options)


SAMPLERS: dict[str, Sampler] = {
    "fixed-large": Sampler(partial(ancestral, variance="large"), order=1, evals_per_step=1, stochastic=True),
    "fixed-small": Sampler(partial(ancestral, variance="small"), order=1, evals_per_step=1, stochastic=True),
    "learned-range": Sampler(
        partial(ancestral, variance="learned"), order=1, evals_per_step=1, stochastic=True, needs_variance=True
    ),
    "ddim": Sampler(ddim, order=1, evals_per_step=1, stochastic=False, takes_eta=True),
    "heun": Sampler(heun, order=2, evals_per_step=2, stochastic=False),
    "dpm++2m": Sampler(dpmpp_2m, order=2, evals_per_step=1, stochastic=False),
    "unipc": Sampler(unipc, order=2, evals_per_step=1, stochastic=False),
}
