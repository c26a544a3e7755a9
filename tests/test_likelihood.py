"""The variational bound, term by term, against torch.distributions, numerical integration and closed forms.

The data are Gaussian, so that the best denoiser is known.
"""

import math
from itertools import pairwise

import pytest
import torch
from scipy import integrate
from torch.distributions import Normal, kl_divergence

from diffusions.likelihood import CHAINS, bound_terms, variational_bound_terms
from diffusions.process import GaussianDiffusion, Prediction
from diffusions.samplers import SAMPLERS
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha, rescale_zero_terminal_snr, time_grid

T = 50
BETAS = BETA_SCHEDULES["linear"](T, 1e-3, 0.2)
ALPHA_BAR = cumulative_alpha(BETAS)
MU, STD = 0.2, 0.3  # of the Gaussian data
VAR_FRAC = 0.3
SHAPE = (3, 1, 2, 2)
LEVELS = torch.tensor([0, 255, 3, 100, 128, 254, 1, 77, 200, 30, 255, 0])
X0 = (LEVELS.double() / 127.5 - 1).view(SHAPE)  # the open levels at both ends among them
GRIDS = [
    ("uniform", T),
    ("uniform", 10),
    ("trailing", 7),
    ("quad", 5),
    ("trailing", 2),
    ("trailing", 1),
    ("uniform", 1),
]
VARIANCES = ["large", "small", "learned"]


class Noise:
    """randn() of one batch; keeps its draws."""

    def __init__(self, shape=SHAPE, seed=1):
        self.generator, self.shape, self.draws = torch.Generator().manual_seed(seed), shape, []

    def __call__(self):
        self.draws.append(torch.randn(self.shape, generator=self.generator, dtype=torch.float64))
        return self.draws[-1]


def gain_at(ab):
    """Of x_t in E[x0 | x_t]."""
    return ab**0.5 * STD**2 / (ab * STD**2 + 1 - ab)


def optimal(alpha_bar=ALPHA_BAR, var_frac=VAR_FRAC):
    """E[x0 | x_t] for data N(MU, STD^2), and a constant fraction of the variance."""

    def denoise(x, t):
        ab = alpha_bar[t].item()
        x0 = MU + gain_at(ab) * (x - ab**0.5 * MU)
        return Prediction(x0, (x - ab**0.5 * x0) / (1 - ab) ** 0.5, torch.full_like(x, var_frac))

    return denoise


def bound(variance="small", grid=None, x0=X0, denoise=None, noise=None):
    grid = grid or time_grid(ALPHA_BAR, "uniform", None)
    return bound_terms(denoise or optimal(), x0, grid, variance, noise or Noise(x0.shape))


def kept_signal(t):
    """alpha_bar_t; 1 at t = -1, the data."""
    return torch.prod(1 - BETAS[: t + 1]).item()


def true_posterior(x0, x_t, ab, prev):
    """q(x_prev | x_t, x0) by Bayes' rule: the precisions of x_prev given x0, and of x_t given x_prev, add up."""
    alpha = ab / prev
    variance = 1 / (1 / (1 - prev) + alpha / (1 - alpha))
    return variance * (prev**0.5 * x0 / (1 - prev) + alpha**0.5 * x_t / (1 - alpha)), variance


def variance_of(name, beta, small):
    fraction = {"small": 0.0, "large": 1.0, "learned": VAR_FRAC}[name]
    return math.exp(fraction * math.log(beta) + (1 - fraction) * math.log(small))


def bits(nats):
    """[B] of [B, C, H, W]: per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


def mass_of_level(x, mean, std):
    """The normal's mass over [x - 1/255, x + 1/255], to infinity at the first and last level, by quadrature."""
    low, high = (x - 1 / 255 if x > -0.999 else -math.inf), (x + 1 / 255 if x < 0.999 else math.inf)
    low, high = max(low, mean - 40 * std), min(high, mean + 40 * std)
    density = lambda y: math.exp(-0.5 * ((y - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    points = [mean + k * std for k in range(-6, 7) if low < mean + k * std < high]
    return integrate.quad(density, low, high, points=points or None, epsabs=0, epsrel=1e-11, limit=200)[0]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("skip_type", "S"), GRIDS)
def test_terms_by_torch_distributions(skip_type, S, variance):
    grid, noise = time_grid(ALPHA_BAR, skip_type, S), Noise()
    terms = bound(variance, grid, noise=noise)
    assert terms.shape == (S + 1, 3) and terms.dtype == torch.float64 and len(noise.draws) == S
    times = grid.t.tolist()
    for i, (t, t_prev) in enumerate(pairwise(times[:-1])):
        ab, prev = kept_signal(t), kept_signal(t_prev)
        x_t = ab**0.5 * X0 + (1 - ab) ** 0.5 * noise.draws[i]
        mean, small = true_posterior(X0, x_t, ab, prev)
        found = true_posterior(optimal()(x_t, t).x0, x_t, ab, prev)[0]
        std = variance_of(variance, 1 - ab / prev, small) ** 0.5
        kl = kl_divergence(Normal(mean, small**0.5), Normal(found, std))
        torch.testing.assert_close(terms[i], bits(kl), rtol=1e-9, atol=1e-12)
    ab = kept_signal(times[0])
    prior = kl_divergence(Normal(ab**0.5 * X0, (1 - ab) ** 0.5), Normal(0 * X0, 1 + 0 * X0))
    torch.testing.assert_close(terms[-1], bits(prior), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("skip_type", "S"), GRIDS)
def test_the_decoder_by_integration(skip_type, S, variance):
    """p(x0 | x_1) is discretised; its variance is beta, or the posterior variance of the step before, or between."""
    grid, noise = time_grid(ALPHA_BAR, skip_type, S), Noise()
    terms = bound(variance, grid, noise=noise)
    ab = kept_signal(grid.t[-2].item())
    x_1 = ab**0.5 * X0 + (1 - ab) ** 0.5 * noise.draws[-1]
    clipped = true_posterior(X0, x_1, kept_signal(grid.t[-3].item()), ab)[1] if S > 1 else 1 - ab
    std = variance_of("small" if variance == "large" else variance, 1 - ab, clipped) ** 0.5
    mean = optimal()(x_1, grid.t[-2].item()).x0
    pairs = zip(X0.flatten().tolist(), mean.flatten().tolist())
    mass = torch.tensor([mass_of_level(*pair, std) for pair in pairs], dtype=torch.float64).view(SHAPE)
    assert mass.min() > 1e-12
    torch.testing.assert_close(terms[-2], bits(-mass.log()), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_expected_kl_of_gaussian_data(variance):
    """E|E[x0 | x_t] - x0|^2 is the variance of x0 given x_t, so the mean over data and noise has a closed form."""
    generator = torch.Generator().manual_seed(0)
    x0 = MU + STD * torch.randn(2000, 1, 4, 4, dtype=torch.float64, generator=generator)
    grid = time_grid(ALPHA_BAR, "trailing", 10)
    terms = bound(variance, grid, x0)
    for i, (_, _, ab, prev) in enumerate(list(grid)[:-1]):
        to_x0, small = true_posterior(1.0, 0.0, ab, prev)
        large = variance_of(variance, 1 - ab / prev, small)
        error = to_x0**2 * STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)
        expected = (math.log(large / small) + small / large - 1 + error / large) / 2 / math.log(2)
        assert terms[i].mean().item() == pytest.approx(expected, abs=4 * terms[i].std().item() / 2000**0.5)


@pytest.mark.parametrize("S", [5, T])
def test_the_bound_of_the_best_chain_is_the_likelihood(S):
    """Where p(x_prev | x_t) is the data's own, there is no gap: the terms sum to -log p(x0), whatever S."""
    generator = torch.Generator().manual_seed(0)
    levels = ((MU + STD * torch.randn(3000, 1, 4, 4, dtype=torch.float64, generator=generator) + 1) * 127.5).round()
    x0, grid = levels.clamp(0, 255) / 127.5 - 1, time_grid(ALPHA_BAR, "quad", S)
    edges = [torch.where(levels <= 0, -torch.inf, levels - 0.5), torch.where(levels >= 255, torch.inf, levels + 0.5)]
    below, above = (Normal(MU, STD).cdf(edge / 127.5 - 1) for edge in edges)
    fractions = {}
    for i, (t, _, ab, prev) in enumerate(grid):
        unsure = STD**2 * (1 - ab) / (ab * STD**2 + 1 - ab)  # the variance of x0 given x_t
        if prev < 1:
            to_x0, small = true_posterior(1.0, 0.0, ab, prev)
            best = small + to_x0**2 * unsure
        else:
            small, best = true_posterior(1.0, 0.0, grid.alpha_bar[i - 1].item(), ab)[1], unsure
        fractions[t] = math.log(best / small) / math.log((1 - ab / prev) / small)
    terms = bound("learned", grid, x0, lambda x, t: optimal(var_frac=fractions[t])(x, t))
    ab = grid.alpha_bar[0].item()  # x_T is not quite standard normal: the prior that fits
    prior = kl_divergence(Normal(ab**0.5 * x0, (1 - ab) ** 0.5), Normal(ab**0.5 * MU, (ab * STD**2 + 1 - ab) ** 0.5))
    gap = terms[:-1].sum(0) + bits(prior) - bits(-(above - below).log())
    assert gap.mean().item() == pytest.approx(0, abs=0.03) and gap.std() / 3000**0.5 < 0.01
    assert bound("small", grid, x0).sum(0).mean() > terms.sum(0).mean() + 0.2, "another variance costs bits"


@pytest.mark.parametrize("objective", ["pred_eps", "pred_x0", "pred_v"])
def test_the_full_chain_is_the_training_bound(objective):
    process, outputs = GaussianDiffusion(ALPHA_BAR, objective, learn_variance=True), []

    def denoise(x, t):
        out = torch.cat([torch.tanh(1.3 * x + math.sin(t)), torch.sin(3 * x + t)], dim=1)
        outputs.append((out, x, t))
        return process.predict(out, x, t, clip=False)

    terms = bound("learned", denoise=denoise)
    assert [t for *_, t in outputs] == list(reversed(range(T)))
    for term, (out, x_t, t) in zip(terms, outputs):
        expected = variational_bound_terms(process, out, X0, x_t, torch.full((3,), t))
        torch.testing.assert_close(term, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("S", [1, 6, T])
def test_an_oracle_pays_for_the_decoder_and_the_prior_only(S):
    oracle = lambda x, t: Prediction(X0, x, torch.zeros_like(x))
    grid = time_grid(ALPHA_BAR, "trailing", S)
    for variance in ("small", "learned"):
        terms = bound(variance, grid, denoise=oracle)
        torch.testing.assert_close(terms[:-2], torch.zeros(S - 1, 3).double(), rtol=0, atol=1e-12)
        assert terms[-2].min() > 0 and terms[-1].min() > 0
    assert (bound("large", grid, denoise=oracle)[:-2] > 1e-7).all(), "its variance is not the posterior's"


@pytest.mark.parametrize("variance", VARIANCES)
def test_without_signal_at_the_end_the_prior_is_free(variance):
    zero_terminal = rescale_zero_terminal_snr(ALPHA_BAR)
    for S in (2, T):
        terms = bound(variance, time_grid(zero_terminal, "trailing", S), denoise=optimal(zero_terminal))
        assert terms.isfinite().all() and terms.min() >= 0 and terms[-1].abs().max() == 0


def test_images_in_float32_do_not_see_each_other():
    """The network gets its own precision, the terms are float64, and row i is a matter of image i alone."""
    seen = []

    def denoise(x, t):
        seen.append(x.dtype)
        return optimal()(x, t)

    together = bound("large", x0=X0.float(), denoise=denoise)
    assert set(seen) == {torch.float32} and together.dtype == torch.float64
    torch.testing.assert_close(together, bound("large"), rtol=1e-3, atol=1e-5)
    noise = Noise()
    alone = bound("large", x0=X0[1:2].float(), noise=lambda: noise()[1:2])
    torch.testing.assert_close(alone, together[:, 1:2], rtol=1e-6, atol=1e-9)


def test_every_ancestral_sampler_has_a_chain():
    """Each has a variance of its own, and so another bound."""
    assert set(CHAINS) == {name for name, sampler in SAMPLERS.items() if sampler.stochastic}
    totals = {name: round(bound(variance).sum().item(), 6) for name, variance in CHAINS.items()}
    assert len(set(totals.values())) == len(totals)
