"""Samplers: each a generator function that walks a TimeGrid from the noise to the data, yielding every step.

A sampler knows only `denoise(x, t) -> Prediction`; the objective, clipping and guidance live behind it. The last step
reaches alpha_bar = 1 and is x0 itself, without noise. New sampler = one function and one line in SAMPLERS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from diffusions.process import Prediction
from diffusions.schedules import TimeGrid

Denoise = Callable[[Tensor, int], Prediction]  # (x_t [B, C, H, W], t) -> what the network says
Randn = Callable[[], Tensor]  # the next [B, C, H, W] standard normal draw of this batch


class Step(NamedTuple):
    """One step of a sampler."""

    t: int  # the timestep that was left
    x: Tensor  # [B, C, H, W], x at the next timestep of the grid; the image after the last step
    x0: Tensor  # [B, C, H, W], the prediction of x0 made at t


def ancestral(denoise: Denoise, x: Tensor, grid: TimeGrid, randn: Randn, *, variance: str) -> Iterator[Step]:
    """DDPM (Ho et al. 2020, algorithm 2 and eq. 7) on the respaced chain, beta_t = 1 - alpha_bar_t / alpha_bar_prev.

    variance: "large", sigma^2 = beta_t, or "small", the posterior variance (section 3.2).
    """
    for t, _, ab, ab_prev in grid:
        alpha = ab / ab_prev
        beta = 1 - alpha
        x0 = denoise(x, t).x0
        x = ab_prev**0.5 * beta / (1 - ab) * x0 + alpha**0.5 * (1 - ab_prev) / (1 - ab) * x
        if ab_prev < 1:
            posterior_share = 1.0 if variance == "large" else (1 - ab_prev) / (1 - ab)
            x = x + (beta * posterior_share) ** 0.5 * randn()
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


@dataclass(frozen=True)
class Sampler:
    """A sampler and what the command line, the tables and the tests need to know of it.

    Calling it: `sampler(denoise, x_T, grid, randn, **options) -> Iterator[Step]`.
    """

    fn: Callable[..., Iterator[Step]]
    order: int  # of convergence in the number of steps
    evals_per_step: float  # network evaluations
    stochastic: bool  # draws noise at its default options
    takes_eta: bool = False
    needs_variance: bool = False  # works only with a network that predicts its variance

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
    "ddim": Sampler(ddim, order=1, evals_per_step=1, stochastic=False, takes_eta=True),
}
