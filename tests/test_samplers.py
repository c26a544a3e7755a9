"""Samplers against closed forms for Gaussian data, oracles and the papers' algorithms.

Every entry of SAMPLERS joins the tests that are parametrised over it; EXACT adds the moments that a sampler must have.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusions.process import GaussianDiffusion, Prediction
from diffusions.samplers import SAMPLERS, Step
from diffusions.schedules import BETA_SCHEDULES, SKIP_TYPES, cumulative_alpha, rescale_zero_terminal_snr, time_grid

T = 100
BETAS = BETA_SCHEDULES["linear"](T, 1e-3, 0.2)
ALPHA_BAR = cumulative_alpha(BETAS)  # ends at 2e-5
ZERO_TERMINAL = rescale_zero_terminal_snr(ALPHA_BAR)
MU, STD = 0.4, 0.5  # of the Gaussian data
VAR_FRAC = 0.3  # of learned-range's variance between the posterior's and beta, in log space
CASES = [
    (name, eta) for name, sampler in SAMPLERS.items() for eta in ((0.0, 0.5, 1.0) if sampler.takes_eta else (0.0,))
]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_case = pytest.mark.parametrize(("name", "eta"), CASES)
every_skip_type = pytest.mark.parametrize("skip_type", SKIP_TYPES)


class Noise:
    """randn() of one batch: the same draws for the same seed, kept in `draws`."""

    def __init__(self, shape, seed=1, dtype=torch.float64):
        self.generator, self.shape, self.dtype = torch.Generator().manual_seed(seed), shape, dtype
        self.draws = []

    def __call__(self):
        self.draws.append(torch.randn(self.shape, generator=self.generator, dtype=self.dtype))
        return self.draws[-1]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prediction(x, x0, alpha_bar):
    """The prediction of x0, with the eps that belongs to it and a constant variance for those who need one."""
    return Prediction(x0, (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5, torch.full_like(x, VAR_FRAC))


def optimal(alpha_bar):
    """The optimal network for data N(MU, STD^2): x0 = E[x0 | x_t]."""

    def denoise(x, t):
        ab = alpha_bar[t].item()
        gain = ab**0.5 * STD**2 / (ab * STD**2 + 1 - ab)
        return prediction(x, MU + gain * (x - ab**0.5 * MU), ab)

    return denoise


def nonlinear(alpha_bar=ALPHA_BAR, objective="pred_eps", clip=False):
    """Some fixed network, read by the process."""
    process = GaussianDiffusion(alpha_bar, objective)
    return lambda x, t: process.predict(torch.tanh(1.3 * x + math.sin(t)) + 0.2, x, t, clip)


def run(name, denoise, x, grid, noise=None, eta=0.0):
    return list(SAMPLERS[name](denoise, x, grid, noise or Noise(x.shape), eta=eta))


# --- Gaussian data: a sampler is an affine map, and what it must do to mean and variance is known ---


def affine_map(name, denoise, grid, eta, step=-1):
    """offset, gain and noise gains of x = offset + gain x_T + sum of noise gain * draw, read off in one batch."""
    S = len(grid)
    x = torch.zeros(S + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    rows = iter(range(2, S + 2))  # one more row than there may be draws

    def unit():
        draw = torch.zeros_like(x)
        draw[next(rows)] = 1
        return draw

    out = run(name, denoise, x, grid, unit, eta)[step].x.flatten()
    return out[0].item(), (out[1] - out[0]).item(), (out[2:] - out[0]).tolist()


def ddpm_moments(grid, eta, noise_variance):
    """Ho et al. 2020, section 3.2: x_{t-1} given x_t and x0, by Bayes' rule on the respaced chain."""
    mean, variance = 0.0, 1.0
    for _, _, ab, prev in grid:
        gain = STD**2 * ab**0.5 / (ab * STD**2 + 1 - ab)  # of x_t in E[x0 | x_t]
        if prev == 1:
            to_x0, to_xt, noise = 1.0, 0.0, 0.0
        else:
            alpha = ab / prev
            small = 1 / (1 / (1 - prev) + alpha / (1 - alpha))
            to_x0, to_xt = small * prev**0.5 / (1 - prev), small * alpha**0.5 / (1 - alpha)
            noise = noise_variance(1 - alpha, small)
        mean = to_x0 * (MU + gain * (mean - ab**0.5 * MU)) + to_xt * mean
        variance = (to_x0 * gain + to_xt) ** 2 * variance + noise
    return mean, variance


def ddim_moments(grid, eta):
    """Song et al. 2021, eq. 12 and 16, with eps in closed form."""
    mean, variance = 0.0, 1.0
    for _, _, ab, prev in grid:
        total = ab * STD**2 + 1 - ab
        x0_gain, eps_gain = STD**2 * ab**0.5 / total, (1 - ab) ** 0.5 / total
        sigma = eta * math.sqrt((1 - prev) / (1 - ab)) * math.sqrt(1 - ab / prev)
        direction = math.sqrt(max(1 - prev - sigma**2, 0))
        centred = mean - ab**0.5 * MU
        mean = prev**0.5 * (MU + x0_gain * centred) + direction * eps_gain * centred
        variance = (prev**0.5 * x0_gain + direction * eps_gain) ** 2 * variance + sigma**2
    return mean, variance


def heun_moments(grid, eta):
    """Karras et al. 2022, algorithm 1 in y = x / sqrt(alpha_bar): dy / dsigma = sigma (y - MU) / (STD^2 + sigma^2)."""
    ab_first = grid.alpha_bar[0].item()
    sigmas = [math.sqrt((1 - ab) / ab) if ab else math.inf for ab in grid.alpha_bar.tolist()]
    slope = lambda sigma: sigma / (STD**2 + sigma**2)  # of y - MU
    if ab_first == 0:  # x0 = MU and eps = x: y = MU + sigma_prev x
        centred, gain, sigmas = 0.0, sigmas[1], sigmas[1:]
    else:
        centred, gain = -MU, ab_first**-0.5
    for sigma, after in pairwise(sigmas):
        euler = 1 + (after - sigma) * slope(sigma)
        step = (euler + 1 + (after - sigma) * slope(after) * euler) / 2 if after else euler
        centred, gain = step * centred, step * gain
    return MU + centred, gain**2


def affine_x0(x, ab):
    """E[x0 | x_t] of x_t = x[0] + x[1] x_T, in the same form."""
    gain = STD**2 * ab**0.5 / (ab * STD**2 + 1 - ab)
    return np.array([MU, 0.0]) + gain * (x - np.array([ab**0.5 * MU, 0.0]))


def exponential_step(x, x0, ab, prev):
    """Exact for a constant x0: with s = alpha / sigma, d(x / sigma) = x0 ds (Lu et al. 2022, proposition 4.1)."""
    if prev == 1:
        return x0
    s, after = math.sqrt(ab / (1 - ab)), math.sqrt(prev / (1 - prev))
    return math.sqrt(1 - prev) * (x / math.sqrt(1 - ab) + (after - s) * x0)


def log_ratios(grid):
    """lambda = log(alpha / sigma) of the noisy timesteps; finite at alpha_bar = 0."""
    return [math.log(ab / (1 - ab)) / 2 if ab else -1e12 for ab in grid.alpha_bar.tolist()[:-1]]


def dpmpp_2m_moments(grid, eta):
    """Lu et al. 2022, algorithm 2: x0 is extrapolated to the middle of the step; the last step is of first order."""
    x, lambdas, x0s = np.array([0.0, 1.0]), log_ratios(grid), []
    for i, (_, _, ab, prev) in enumerate(grid):
        x0s.append(affine_x0(x, ab))
        slope = (x0s[i] - x0s[i - 1]) / (lambdas[i] - lambdas[i - 1]) if i else 0.0
        ahead = (lambdas[i + 1] - lambdas[i]) / 2 if prev < 1 else 0.0
        x = exponential_step(x, x0s[i] + slope * ahead, ab, prev)
    return x[0], x[1] ** 2


def unipc_moments(grid, eta):
    """Zhao et al. 2023, algorithms 1 and 2 with p = 2: R rho = b, and rho = 1/2 where it is one unknown.

    R = [r_m^(k-1)] with r_m = (lambda_m - lambda) / h, and b_k the mean of u^k over the step under the weight e^(h u),
    which makes the step exact for polynomials in lambda; here by quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    nodes, weights = (nodes + 1) / 2, weights / 2
    x, lambdas, x0s, steps = np.array([0.0, 1.0]), log_ratios(grid), [], list(grid)
    start = x
    for i, (_, _, ab, prev) in enumerate(steps):
        x0s.append(affine_x0(x, ab))
        if i:  # UniC from `start`, with the x0 of its end
            rho, D = [0.5], [x0s[i] - x0s[i - 1]]
            if i > 1:
                h = lambdas[i] - lambdas[i - 1]
                r = (lambdas[i - 2] - lambdas[i - 1]) / h
                b = [np.average(nodes**k, weights=weights * np.exp(h * (nodes - 1))) for k in (1, 2)]
                rho, D = np.linalg.solve([[1, 1], [r, 1]], b), [(x0s[i - 2] - x0s[i - 1]) / r, *D]
            x = exponential_step(start, x0s[i - 1] + sum(p * d for p, d in zip(rho, D)), *steps[i - 1][2:])
        start, D = x, 0.0
        if i and prev < 1:  # UniP-2; UniP-1 has no D
            D = (x0s[i - 1] - x0s[i]) * (lambdas[i + 1] - lambdas[i]) / (lambdas[i - 1] - lambdas[i])
        x = exponential_step(start, x0s[i] + D / 2, ab, prev)
    return x[0], x[1] ** 2


EXACT = {
    "fixed-large": lambda grid, eta: ddpm_moments(grid, eta, lambda beta, small: beta),
    "fixed-small": lambda grid, eta: ddpm_moments(grid, eta, lambda beta, small: small),
    "learned-range": lambda grid, eta: ddpm_moments(
        grid, eta, lambda beta, small: math.exp(VAR_FRAC * math.log(beta) + (1 - VAR_FRAC) * math.log(small))
    ),
    "ddim": ddim_moments,
    "heun": heun_moments,
    "dpm++2m": dpmpp_2m_moments,
    "unipc": unipc_moments,
}


def test_the_moments_of_every_sampler_are_known():
    assert sorted(EXACT) == sorted(SAMPLERS)


@pytest.mark.parametrize("S", [1, 2, 5, 10, 50, T])
@every_skip_type
@every_case
def test_moments_for_gaussian_data(name, eta, skip_type, S):
    for alpha_bar in (ALPHA_BAR, ZERO_TERMINAL):
        grid = time_grid(alpha_bar, skip_type, S)
        offset, gain, noise_gains = affine_map(name, optimal(alpha_bar), grid, eta)
        mean, variance = EXACT[name](grid, eta)
        assert offset == pytest.approx(mean, rel=1e-9, abs=1e-12)  # x_T has mean 0 and variance 1
        assert gain**2 + sum(g**2 for g in noise_gains) == pytest.approx(variance, rel=1e-9, abs=1e-12)


@every_case
def test_the_map_is_affine(name, eta):
    """What the tests above and below rest on: the probes predict the output for any x_T and any noise."""
    grid, x = time_grid(ALPHA_BAR, "linspace", 10), normal(5, 1, 1, 1)
    offset, gain, noise_gains = affine_map(name, optimal(ALPHA_BAR), grid, eta)
    noise = Noise(x.shape)
    out = run(name, optimal(ALPHA_BAR), x, grid, noise, eta)[-1].x
    expected = offset + gain * x + sum(g * draw for g, draw in zip(noise_gains, noise.draws))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@every_case
def test_more_steps_approach_the_data(name, eta):
    errors = {}
    alpha_bar = cumulative_alpha(BETA_SCHEDULES["linear"](1000, 1e-4, 0.02))
    for S in (10, 1000):
        offset, gain, noise_gains = affine_map(name, optimal(alpha_bar), time_grid(alpha_bar, "linspace", S), eta)
        std = math.sqrt(gain**2 + sum(g**2 for g in noise_gains))
        errors[S] = abs(offset - MU) + abs(std - STD)
    assert errors[1000] < 0.01 and errors[1000] < 0.2 * errors[10]


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.stochastic])
def test_order_of_convergence(name):
    """The slope of the error against the exact probability flow between the ends of the noisy part of the grid.

    Multistep solvers, of a higher order than evaluations per step, want even steps in lambda; UniC adds up to an order.
    """
    order, multistep = SAMPLERS[name].order, SAMPLERS[name].order > SAMPLERS[name].evals_per_step
    alpha_bar = cumulative_alpha(BETA_SCHEDULES["linear"](1000, 1e-4, 0.02))
    counts, errors = (20, 40, 80, 160), []
    for S in counts:
        grid = time_grid(alpha_bar, "logsnr" if multistep else "uniform", S)
        _, gain, noise_gains = affine_map(name, optimal(alpha_bar), grid, 0.0, step=-2)
        assert not any(noise_gains)
        first, last = (ab * STD**2 + 1 - ab for ab in grid.alpha_bar[[0, -2]].tolist())
        errors.append(abs(gain - math.sqrt(last / first)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.1 < slope - order < 0.7


# --- contracts of every sampler ---


@every_skip_type
@every_case
def test_an_oracle_recovers_x0(name, eta, skip_type):
    """The last step must reach alpha_bar = 1; without clipping, and also where alpha_bar_T = 0."""
    x0 = 1.5 * normal(2, 3, 2, 2, seed=3)
    for alpha_bar in (ALPHA_BAR, ZERO_TERMINAL):
        for S in (1, 2, 7, 30, T):
            grid = time_grid(alpha_bar, skip_type, S)
            denoise = lambda x, t: prediction(x, x0, alpha_bar[t].item())
            steps = run(name, denoise, normal(2, 3, 2, 2), grid, eta=eta)
            torch.testing.assert_close(steps[-1].x, x0, rtol=1e-9, atol=1e-9)
            assert all(torch.equal(step.x0, x0) for step in steps)


@pytest.mark.parametrize(("objective", "alpha_bar"), [("pred_eps", ALPHA_BAR), ("pred_v", ZERO_TERMINAL)])
@every_skip_type
def test_an_oracle_network_recovers_x0_through_the_process(skip_type, objective, alpha_bar):
    x0 = normal(2, 3, 2, 2, seed=3)

    def denoise(x, t):
        eps = (x - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()
        mean_out = process.target(x0, torch.full((2,), t), eps)
        return process.predict(torch.cat([mean_out, x], dim=1) if learns else mean_out, x, t, clip=False)

    for S in (1, 10, T):
        grid = time_grid(alpha_bar, skip_type, S)
        for name, eta in CASES:
            learns = SAMPLERS[name].needs_variance
            process = GaussianDiffusion(alpha_bar, objective, learn_variance=learns)
            torch.testing.assert_close(run(name, denoise, normal(2, 3, 2, 2), grid, eta=eta)[-1].x, x0)


@pytest.mark.parametrize("S", [1, 2, 10, T])
@every_skip_type
@every_case
def test_steps_and_evaluations(name, eta, skip_type, S):
    grid, x, calls = time_grid(ALPHA_BAR, skip_type, S), normal(3, 1, 2, 2), []
    before = x.clone()

    def denoise(x, t):
        calls.append(t)
        return optimal(ALPHA_BAR)(x, t)

    steps = run(name, denoise, x, grid, eta=eta)
    assert all(type(step) is Step for step in steps)
    assert [step.t for step in steps] == grid.t.tolist()[:-1]
    assert all(step.x.shape == step.x0.shape == x.shape and step.x.dtype == x.dtype for step in steps)
    assert torch.equal(x, before), "x_T was written over"
    assert sorted(set(calls), reverse=True) == grid.t.tolist()[:-1], "the network saw other timesteps than the grid's"
    assert len(calls) == SAMPLERS[name].evaluations(S)


@every_case
def test_a_sampler_is_lazy_and_yields_values_of_its_own(name, eta):
    calls, x = [], normal(2, 1, 2, 2)
    denoise = lambda x, t: calls.append(t) or optimal(ALPHA_BAR)(x, t)
    steps = SAMPLERS[name](denoise, x, time_grid(ALPHA_BAR, "uniform", 10), Noise(x.shape), eta=eta)
    assert not calls
    first = next(steps)
    assert len(calls) <= math.ceil(SAMPLERS[name].evals_per_step)
    kept = first.x.clone(), first.x0.clone()
    assert len(list(steps)) == 9
    assert torch.equal(first.x, kept[0]) and torch.equal(first.x0, kept[1]), "later steps wrote over an earlier one"


@pytest.mark.parametrize("S", [1, 2, 10, T])
@every_skip_type
@every_case
def test_noise_is_drawn_once_a_step_and_not_at_the_last(name, eta, skip_type, S):
    x = normal(2, 1, 2, 2)
    noise = Noise(x.shape)
    steps = SAMPLERS[name](optimal(ALPHA_BAR), x, time_grid(ALPHA_BAR, skip_type, S), noise, eta=eta)
    drawn = [len(noise.draws) for _ in steps]
    stochastic = SAMPLERS[name].stochastic or eta > 0
    assert drawn == ([*range(1, S), S - 1] if stochastic else [0] * S)


@every_sampler
def test_eta_is_refused_by_samplers_that_ignore_it(name):
    x, grid = normal(1, 1, 2, 2), time_grid(ALPHA_BAR, "uniform", 2)
    outputs = []
    for eta in (0.0, 0.7):
        if eta and not SAMPLERS[name].takes_eta:
            with pytest.raises(ValueError, match=r"eta = 0\.7"):
                SAMPLERS[name](optimal(ALPHA_BAR), x, grid, Noise(x.shape), eta=eta)
        else:
            outputs.append(run(name, optimal(ALPHA_BAR), x, grid, eta=eta)[-1].x)
    assert len(outputs) == 1 or not torch.equal(*outputs)
    default = list(SAMPLERS[name](optimal(ALPHA_BAR), x, grid, Noise(x.shape)))
    assert torch.equal(default[-1].x, outputs[0]), "eta is 0 unless it is given"


@every_case
def test_rows_do_not_see_each_other(name, eta):
    grid, x = time_grid(ALPHA_BAR, "quad", 10), normal(4, 1, 2, 2)
    noise = Noise(x.shape)
    together = run(name, optimal(ALPHA_BAR), x, grid, noise, eta)[-1].x
    for i in range(len(x)):
        draws = iter(noise.draws)
        alone = run(name, optimal(ALPHA_BAR), x[i : i + 1], grid, lambda: next(draws)[i : i + 1], eta)[-1].x
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)


# --- the full chain, and the relations between samplers ---


@every_case
def test_all_steps_are_the_same_chain_for_every_skip_type(name, eta):
    x, grids = normal(2, 1, 2, 2), [time_grid(ALPHA_BAR, skip_type, S) for skip_type in SKIP_TYPES for S in (T, None)]
    outputs = [run(name, optimal(ALPHA_BAR), x, grid, eta=eta)[-1].x for grid in grids]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(("name", "eta"), [("fixed-large", 0.0), ("fixed-small", 0.0), ("ddim", 1.0)])
def test_the_full_chain_is_algorithm_2(name, eta):
    """Ho et al. 2020, algorithm 2, from the betas themselves."""
    x, noise = normal(2, 1, 4, 4), Noise((2, 1, 4, 4))
    steps = run(name, nonlinear(), x, time_grid(ALPHA_BAR, "uniform", T), noise, eta)
    draws = iter(noise.draws)
    for t, step in zip(reversed(range(T)), steps):
        beta, ab = BETAS[t], ALPHA_BAR[t]
        x = (x - beta / (1 - ab).sqrt() * nonlinear()(x, t).eps) / (1 - beta).sqrt()
        if t > 0:
            variance = beta if name == "fixed-large" else (1 - ALPHA_BAR[t - 1]) / (1 - ab) * beta
            x = x + variance.sqrt() * next(draws)
        torch.testing.assert_close(step.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("S", [2, 10, T])
@every_skip_type
def test_ddim_with_eta_1_is_fixed_small(skip_type, S):
    grid, x = time_grid(ALPHA_BAR, skip_type, S), normal(2, 1, 4, 4)
    small, ddim, large = (
        run(name, nonlinear(), x, grid, eta=eta)
        for name, eta in [("fixed-small", 0.0), ("ddim", 1.0), ("fixed-large", 0.0)]
    )
    for a, b in zip(small, ddim, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-9, atol=1e-9)
    assert (small[-2].x - large[-2].x).abs().max() > 1e-3, "after the last noise"


@pytest.mark.parametrize(("frac", "fixed"), [(0.0, "fixed-small"), (1.0, "fixed-large")])
@pytest.mark.parametrize("S", [1, 2, 10, T])
@every_skip_type
def test_learned_range_ends_in_the_fixed_variances(skip_type, S, frac, fixed):
    grid, x = time_grid(ALPHA_BAR, skip_type, S), normal(2, 1, 4, 4)
    denoise = lambda x, t: optimal(ALPHA_BAR)(x, t)._replace(var_frac=torch.full_like(x, frac))
    for ours, theirs in zip(run("learned-range", denoise, x, grid), run(fixed, denoise, x, grid), strict=True):
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-12, atol=1e-12)


def test_the_documentation_has_a_row_for_every_sampler_and_skip_type():
    text = (ROOT / "docs/samplers.md").read_text()
    for name, sampler in SAMPLERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))  # its table comes first
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3] == str(sampler.order) and cells[5] == ("S" if sampler.evals_per_step == 1 else "2S - 1")
        assert cells[4] == ("`--eta` > 0" if sampler.takes_eta else "yes" if sampler.stochastic else "no")
    assert all(f"| `{name}` |" in text for name in SKIP_TYPES)
