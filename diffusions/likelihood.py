"""The terms of the variational bound (Ho et al. 2020, eq. 5; Nichol and Dhariwal 2021, section 3)."""

import math

import torch
from torch import Tensor

from diffusions.posterior import posterior
from diffusions.schedules import TimeGrid


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) per element, in nats."""
    return 0.5 * (log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp() - 1)


def discretized_gaussian_nll(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """-log p(x0) per element, in nats, of 256 levels in [-1, 1] with the ends open (Ho et al. 2020, eq. 13)."""
    scale = (-log_std).exp() * 0.5**0.5  # ndtr(z) = erfc(-z / sqrt(2)) / 2, and erfc keeps its digits in the tail
    upper, lower = (x0 - mean + 1 / 255) * scale, (x0 - mean - 1 / 255) * scale
    distance = (x0 - mean).abs()  # by symmetry always the difference of two small numbers
    inside = (torch.erfc((distance - 1 / 255) * scale) - torch.erfc((distance + 1 / 255) * scale)) / 2
    probability = torch.where(x0 < -0.999, torch.erfc(-upper) / 2, inside)
    probability = torch.where(x0 > 0.999, torch.erfc(lower) / 2, probability)
    return -probability.clamp(min=1e-12).log()


def log_variances(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, small_at_end: Tensor) -> tuple[Tensor, Tensor]:
    """log of beta_t and log of the posterior variance; the latter's zero at the last step becomes `small_at_end`."""
    small = posterior(alpha_bar_t, alpha_bar_prev)[2]
    return (1 - alpha_bar_t / alpha_bar_prev).log(), torch.where(small > 0, small, small_at_end).log()


def clipped_variance(alpha_bar: Tensor) -> Tensor:
    """What stands for the posterior variance at the step to the data: that of the step before it.

    alpha_bar [S] of a chain's noisy points, from the data on (Ho et al. 2020, released code).
    """
    return posterior(alpha_bar[1], alpha_bar[0])[2] if len(alpha_bar) > 1 else 1 - alpha_bar[0]


def variational_bound_terms(process, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_t of a network that learns its variance, [B], in bits per dimension; at t = 0 the decoder's -log p(x0 | x_1).

    out [B, 2C, H, W] with the variance fraction in the second half (Nichol and Dhariwal 2021, eq. 15); x0, x_t
    [B, C, H, W]; t [B] int64. x0 is not clipped. Bits, as in the authors' released code, set the hybrid loss's weight.
    """
    ab = process.alpha_bar.to(t.device)
    prev = torch.cat([torch.ones(1, dtype=ab.dtype, device=ab.device), ab[:-1]])
    log_beta, log_posterior = log_variances(ab, prev, clipped_variance(ab))
    coefficients = torch.stack([*posterior(ab, prev)[:2], log_beta, log_posterior])
    c_x0, c_xt, log_max, log_min = coefficients[:, t].to(x0.dtype)[..., None, None, None].unbind(0)
    var_frac = (out.chunk(2, dim=1)[1] + 1) / 2
    log_var = var_frac * log_max + (1 - var_frac) * log_min
    x0_hat = process.x0_from(out.chunk(2, dim=1)[0], x_t, t)
    mean = c_x0 * x0_hat + c_xt * x_t
    kl = gaussian_kl(c_x0 * x0 + c_xt * x_t, log_min, mean, log_var).flatten(1).mean(1)
    nll = discretized_gaussian_nll(x0, mean, 0.5 * log_var).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


# The chains that have a bound, by the name of their sampler: the variance of p(x_prev | x_t).
CHAINS = {"fixed-large": "large", "fixed-small": "small", "learned-range": "learned"}


@torch.no_grad()
def bound_terms(denoise, x0: Tensor, grid: TimeGrid, variance: str, randn) -> Tensor:
    """The variational bound of -log p(x0), term by term: [S + 1, B] in bits per dimension; their sum is the bound.

    Row i < S is L of the grid's i-th step (one draw of x_t each): a KL, and at the last the decoder's -log p(x0 | x_1)
    of 256 levels; row S is the prior's KL (Ho et al. 2020, eq. 5). variance: "large", "small" or "learned"; at the last
    step the posterior variance is the clipped one, also for "large", as in the released code.
    """
    ab_noisy, ab_next = grid.alpha_bar[:-1], grid.alpha_bar[1:]
    log_large, log_small = log_variances(ab_noisy, ab_next, clipped_variance(ab_noisy.flip(0)))
    exact, terms = x0.double(), []
    for i, (t, _, ab, ab_prev) in enumerate(grid):
        x_t = (ab**0.5 * exact + (1 - ab) ** 0.5 * randn()).to(x0.dtype)
        found, _, var_frac = denoise(x_t, t)
        if variance == "learned":
            log_var = log_small[i] + var_frac.double() * (log_large[i] - log_small[i])
        else:
            log_var = log_large[i] if variance == "large" and ab_prev < 1 else log_small[i]
        of_x0, of_x, _ = posterior(ab, ab_prev)
        mean, true_mean = (of_x0 * image + of_x * x_t.double() for image in (found.double(), exact))
        if ab_prev < 1:
            terms.append(gaussian_kl(true_mean, log_small[i], mean, log_var))
        else:
            terms.append(discretized_gaussian_nll(exact, mean, 0.5 * log_var))
    ab, zero = grid.alpha_bar[0], torch.zeros((), dtype=torch.float64)
    terms.append(gaussian_kl(ab**0.5 * exact, torch.log1p(-ab), zero, zero))
    return torch.stack([term.flatten(1).mean(1) for term in terms]) / math.log(2)
