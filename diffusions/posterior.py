"""q(x_prev | x_t, x0), what one step of the forward process leaves open (Ho et al. 2020, eq. 6 and 7)."""

from typing import TypeVar

from torch import Tensor

Real = TypeVar("Real", float, Tensor)


def posterior(alpha_bar_t: Real, alpha_bar_prev: Real) -> tuple[Real, Real, Real]:
    """(a, b, variance): the mean is a x0 + b x_t. At alpha_bar_prev = 1 that is x0, and the variance 0."""
    alpha = alpha_bar_t / alpha_bar_prev
    left = (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar_t), alpha**0.5 * left, (1 - alpha) * left
