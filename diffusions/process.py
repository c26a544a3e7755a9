"""The forward process, the training loss, and what a network output means."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusions.likelihood import variational_bound_terms
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha, rescale_zero_terminal_snr


class Prediction(NamedTuple):
    """What the network says about x_t."""

    x0: Tensor  # [B, C, H, W]
    eps: Tensor  # [B, C, H, W], consistent with x0: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    var_frac: Tensor | None  # [B, C, H, W], 0: posterior variance, 1: beta (in log space); None: not predicted


class GaussianDiffusion:
    """q(x_t | x0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I) for t = 0..T-1 (Ho et al. 2020, eq. 4).

    Args:
        alpha_bar: [T] float64.
        objective: pred_eps, pred_x0 or pred_v (v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0; Salimans and Ho 2022).
        learn_variance: the network has 2C outputs and the loss is hybrid (Nichol and Dhariwal 2021, eq. 16).
        loss_weighting: none (of the objective's own error), min_snr (Hang et al. 2023, gamma = 5) or p2 (Choi et al.
            2022, gamma = 1, k = 1).

    Raises:
        ValueError: unknown objective or weighting, or pred_eps with a schedule that ends at alpha_bar = 0.
    """

    def __init__(
        self,
        alpha_bar: Tensor,
        objective: str = "pred_eps",
        learn_variance: bool = False,
        loss_weighting: str = "none",
    ) -> None:
        if objective not in ("pred_eps", "pred_x0", "pred_v"):
            raise ValueError(f"unknown objective {objective!r}; the objectives are pred_eps, pred_x0, pred_v")
        if loss_weighting not in ("none", "min_snr", "p2"):
            raise ValueError(f"unknown loss weighting {loss_weighting!r}; the weightings are none, min_snr, p2")
        if objective == "pred_eps" and alpha_bar[-1] <= 0:
            raise ValueError("pred_eps can't work where alpha_bar_T = 0: use pred_v or pred_x0")
        self.alpha_bar = alpha_bar.double()
        self.objective = objective
        self.learn_variance = learn_variance
        self.loss_weights = _loss_weights(self.alpha_bar, objective, loss_weighting)  # [T] float64
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def total_steps(self) -> int:
        return len(self.alpha_bar)

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x0, eps [B, C, H, W] and t [B] int64 -> x_t [B, C, H, W] (Ho et al. 2020, eq. 4)."""
        signal, noise, _ = self._at(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should output under the objective, [B, C, H, W]."""
        if self.objective != "pred_v":
            return eps if self.objective == "pred_eps" else x0
        signal, noise, _ = self._at(t, x0)
        return signal * eps - noise * x0

    def x0_from(self, mean_out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a network output implies, unclipped; t [B] int64 may differ within the batch."""
        signal, noise, _ = self._at(t, x_t)
        if self.objective == "pred_eps":
            return (x_t - noise * mean_out) / signal
        return mean_out if self.objective == "pred_x0" else signal * x_t - noise * mean_out

    def loss(self, model, x0: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """The training loss per example, [B]: a mean over C, H, W, not reduced over B (Ho et al. 2020, eq. 14).

        x0 in [-1, 1]; t [B] int64 in 0..T-1; eps standard normal like x0; cond goes to the network as it is.
        """
        x_t = self.add_noise(x0, t, eps)
        out = model(x_t, t, **cond).to(x0.dtype)
        mean_out, var_out = out.chunk(2, dim=1) if self.learn_variance else (out, None)
        error = (mean_out - self.target(x0, t, eps)).square().flatten(1).mean(1)
        loss = self._at(t, x0)[2].flatten() * error
        if self.learn_variance:
            bound = variational_bound_terms(self, torch.cat([mean_out.detach(), var_out], dim=1), x0, x_t, t)
            loss = loss + 1e-3 * self.total_steps * bound
        return loss

    def predict(self, out: Tensor, x_t: Tensor, t: int, clip: bool) -> Prediction:
        """Read the network output at timestep t (the same for the whole batch).

        Args:
            out: [B, C, H, W], or [B, 2C, H, W] where the variance is learned.
            x_t: [B, C, H, W].
            t: 0..T-1.
            clip: clip x0 to [-1, 1] and derive eps again from the clipped x0.
        """
        mean_out, var_out = out.chunk(2, dim=1) if self.learn_variance else (out, None)
        alpha_bar = self.alpha_bar[t].item()
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.objective == "pred_eps":
            x0, eps = (x_t - noise * mean_out) / signal, mean_out
        elif self.objective == "pred_x0":
            x0, eps = mean_out, (x_t - signal * mean_out) / noise
        else:
            x0, eps = signal * x_t - noise * mean_out, noise * x_t + signal * mean_out
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - signal * x0) / noise
        return Prediction(x0, eps, None if var_out is None else (var_out + 1) / 2)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sqrt(alpha_bar), sqrt(1 - alpha_bar) and the loss weight at t, each [B, 1, 1, 1] in like's precision."""
        if t.device not in self._tables:
            table = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt(), self.loss_weights])
            self._tables[t.device] = table.to(t.device)
        return self._tables[t.device][:, t].to(like.dtype)[..., None, None, None].unbind(0)


def build_process(options) -> GaussianDiffusion:
    """The process that `options` (the config's diffusion section) describes."""
    betas = BETA_SCHEDULES[options.beta_schedule](options.total_steps, options.beta_start, options.beta_end)
    alpha_bar = cumulative_alpha(betas)
    if options.zero_terminal_snr:
        alpha_bar = rescale_zero_terminal_snr(alpha_bar)
    return GaussianDiffusion(alpha_bar, options.objective, options.learn_variance, options.loss_weighting)


def _loss_weights(alpha_bar: Tensor, objective: str, weighting: str) -> Tensor:
    """[T]: the weight of the objective's squared error. Published weights are of the x0 or eps error; convert them."""
    if weighting == "none":
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    # |eps error|^2 = SNR |x0 error|^2, and |v error|^2 = (SNR + 1) |x0 error|^2.
    of_x0 = snr.clamp(max=5.0) if weighting == "min_snr" else snr / (1 + snr)
    return of_x0 / {"pred_x0": torch.ones_like(snr), "pred_eps": snr, "pred_v": snr + 1}[objective]
