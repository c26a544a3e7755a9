"""Noise schedules over the T training timesteps, and the S of them that a sampler visits."""

import math
from collections.abc import Callable, Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor


def linear(T: int, start: float, end: float) -> Tensor:
    """Ho et al. 2020, section 4."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def cosine(T: int, start: float, end: float) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17, with s = 0.008 and beta at most 0.999; takes no start and end."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def sigmoid(T: int, start: float, end: float) -> Tensor:
    """A logistic curve over [-6, 6] from start to end (Song et al. 2021, released code)."""
    return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start


def quad(T: int, start: float, end: float) -> Tensor:
    """The square root of beta is linear (Song et al. 2021, released code)."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2


def const(T: int, start: float, end: float) -> Tensor:
    """beta = end at every timestep."""
    return torch.full((T,), end, dtype=torch.float64)


def jsd(T: int, start: float, end: float) -> Tensor:
    """beta_t = 1 / (T - t) for t = 0..T-1 (Sohl-Dickstein et al. 2015, section 2.4.1); ends at alpha_bar = 0."""
    return 1 / torch.linspace(T, 1, T, dtype=torch.float64)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "quad": quad,
    "const": const,
    "jsd": jsd,
}


def cumulative_alpha(betas: Tensor) -> Tensor:
    """beta [T] -> alpha_bar [T] = cumulative product of (1 - beta), float64."""
    return torch.cumprod(1 - betas.double(), dim=0)


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """lambda = log(alpha / sigma) = log(alpha_bar / (1 - alpha_bar)) / 2 (Lu et al. 2022, arXiv 2206.00927)."""
    return (alpha_bar.log() - torch.log1p(-alpha_bar)) / 2


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first is kept (Lin et al. 2024, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def uniform_steps(alpha_bar: Tensor, S: int) -> Tensor:
    """floor(i T / S): `range(0, T, T // S)` wherever S divides T."""
    return torch.arange(S) * len(alpha_bar) // S


def quad_steps(alpha_bar: Tensor, S: int) -> Tensor:
    """int(linspace(0, sqrt(0.8 T), S)^2): dense near the data, from about 0.8 T on (Song et al. 2021, appendix D.2)."""
    return torch.from_numpy((np.linspace(0, np.sqrt(len(alpha_bar) * 0.8), S) ** 2).astype(np.int64))


def trailing_steps(alpha_bar: Tensor, S: int) -> Tensor:
    """round((i + 1) T / S) - 1: always includes T - 1 (Lin et al. 2024, table 2)."""
    T = len(alpha_bar)
    return torch.from_numpy(np.round(np.arange(T, 0, -T / S))[:S][::-1].astype(np.int64) - 1)


def linspace_steps(alpha_bar: Tensor, S: int) -> Tensor:
    """round(linspace(0, T - 1, S)): includes both ends where S > 1 (Lin et al. 2024, table 2)."""
    return torch.from_numpy(np.linspace(0, len(alpha_bar) - 1, S).round().astype(np.int64))


def logsnr_steps(alpha_bar: Tensor, S: int) -> Tensor:
    """Evenly spaced in lambda, the half log SNR, from T - 1 to 0, rounded (Lu et al. 2022, arXiv 2206.00927).

    Where lambda of T - 1 is -inf, the rest is spaced from the finite one before it.
    """
    T, lambdas = len(alpha_bar), half_log_snr(alpha_bar).numpy()
    lambdas = lambdas.clip(min=lambdas.min(where=np.isfinite(lambdas), initial=lambdas[0].clip(min=0.0)))
    wanted = np.linspace(lambdas[0], lambdas[-1], S)
    t = np.interp(wanted, lambdas[::-1], np.arange(T)[::-1]).round().astype(np.int64)
    t[-1] = T - 1
    return torch.from_numpy(t)


def strictly_ascending(t: Tensor, T: int) -> Tensor:
    """Remove duplicates from ascending timesteps by the smallest shifts, keeping the count and 0 <= t < T."""
    values, S = t.tolist(), len(t)
    for i in range(1, S):
        values[i] = max(values[i], values[i - 1] + 1)
    return torch.tensor([min(value, T - S + i) for i, value in enumerate(values)])


def _strict(raw: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    def steps(alpha_bar: Tensor, S: int) -> Tensor:
        return strictly_ascending(raw(alpha_bar, S), len(alpha_bar))

    steps.__doc__ = raw.__doc__
    return steps


SKIP_TYPES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": _strict(uniform_steps),
    "quad": _strict(quad_steps),
    "trailing": _strict(trailing_steps),
    "linspace": _strict(linspace_steps),
    "logsnr": _strict(logsnr_steps),
}


class TimeGrid:
    """The timesteps of a sampler, padded with the data end and read at both ends of every step.

    Attributes:
        t: [S+1] int64, descending; t[-1] = -1 is the data.
        alpha_bar: [S+1] float64; alpha_bar[-1] = 1.
    """

    def __init__(self, alpha_bar: Tensor, t: Tensor) -> None:
        """alpha_bar [T] of the training schedule; t [S] strictly ascending timesteps."""
        self.t = torch.cat([t.flip(0), torch.tensor([-1])])
        self.alpha_bar = torch.cat([alpha_bar[t.flip(0)], torch.ones(1, dtype=torch.float64)])

    def __len__(self) -> int:
        return len(self.t) - 1

    def __str__(self) -> str:
        """A line per step: t and alpha_bar at both ends, and lambda = log(alpha / sigma) at its start."""
        lines = ["step     t  t_prev  alpha_bar_t   alpha_bar_prev  lambda"]
        for i, ((t, t_prev, ab, ab_prev), lam) in enumerate(zip(self, half_log_snr(self.alpha_bar).tolist()), 1):
            lines.append(f"{i:4} {t:5} {t_prev:7}  {ab:<12.6g}  {ab_prev:<14.6g}  {lam:.4f}")
        return "\n".join(lines)

    def steps(self) -> Iterator["TimeGrid"]:
        """Each step as a grid of its own, which ends at the next timestep instead of the data."""
        for i in range(len(self)):
            one = copy(self)
            one.t, one.alpha_bar = self.t[i : i + 2], self.alpha_bar[i : i + 2]
            yield one

    def __iter__(self) -> Iterator[tuple[int, int, float, float]]:
        """(t, t_prev, alpha_bar_t, alpha_bar_prev) as Python numbers, from the noise to the data."""
        t, alpha_bar = self.t.tolist(), self.alpha_bar.tolist()
        return zip(t[:-1], t[1:], alpha_bar[:-1], alpha_bar[1:])


def time_grid(alpha_bar: Tensor, skip_type: str, skip_steps: int | None) -> TimeGrid:
    """The grid of `skip_steps` timesteps (None: all T) placed by `skip_type`.

    Raises:
        ValueError: an unknown skip type, or not 1 <= skip_steps <= T.
    """
    T = len(alpha_bar)
    S = T if skip_steps is None else skip_steps
    if skip_type not in SKIP_TYPES:
        raise ValueError(f"unknown skip type {skip_type!r}; the skip types are {', '.join(SKIP_TYPES)}")
    if not 1 <= S <= T:
        raise ValueError(f"skip_steps = {S}: wanted 1 to {T}, the number of training timesteps")
    return TimeGrid(alpha_bar, SKIP_TYPES[skip_type](alpha_bar, S))
