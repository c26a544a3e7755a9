"""The terms of the variational bound (Ho et al. 2020, eq. 5; Nichol and Dhariwal 2021, section 3)."""

import math

import torch
from torch import Tensor


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
    beta = 1 - alpha_bar_t / alpha_bar_prev
    posterior = beta * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return beta.log(), torch.where(posterior > 0, posterior, small_at_end).log()


def variational_bound_terms(process, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_t of a network that learns its variance, [B], in bits per dimension; at t = 0 the decoder's -log p(x0 | x_1).

    out [B, 2C, H, W] with the variance fraction in the second half (Nichol and Dhariwal 2021, eq. 15); x0, x_t
    [B, C, H, W]; t [B] int64. x0 is not clipped. Bits, as in the authors' released code, set the hybrid loss's weight.
    """
    ab = process.alpha_bar.to(t.device)
    prev = torch.cat([torch.ones(1, dtype=ab.dtype, device=ab.device), ab[:-1]])
    second = (1 - ab[1] / ab[0]) * (1 - ab[0]) / (1 - ab[1]) if len(ab) > 1 else 1 - ab[0]
    log_beta, log_posterior = log_variances(ab, prev, second)
    beta = 1 - ab / prev
    coefficients = torch.stack(
        [prev.sqrt() * beta / (1 - ab), (1 - beta).sqrt() * (1 - prev) / (1 - ab), log_beta, log_posterior]
    )
    c_x0, c_xt, log_max, log_min = coefficients[:, t].to(x0.dtype)[..., None, None, None].unbind(0)
    var_frac = (out.chunk(2, dim=1)[1] + 1) / 2
    log_var = var_frac * log_max + (1 - var_frac) * log_min
    x0_hat = process.x0_from(out.chunk(2, dim=1)[0], x_t, t)
    mean = c_x0 * x0_hat + c_xt * x_t
    kl = gaussian_kl(c_x0 * x0 + c_xt * x_t, log_min, mean, log_var).flatten(1).mean(1)
    nll = discretized_gaussian_nll(x0, mean, 0.5 * log_var).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)
