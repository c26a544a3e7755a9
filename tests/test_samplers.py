"""Samplers against closed forms for Gaussian data, oracles, the papers' algorithms and diffusers.

Every entry of SAMPLERS joins the tests that are parametrised over it; EXACT adds the moments that a sampler must have.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusions.process import GaussianDiffusion, Prediction
from diffusions.samplers import SAMPLERS, Step
from diffusions.schedules import BETA_SCHEDULES, SKIP_TYPES, cumulative_alpha, rescale_zero_terminal_snr, time_grid

T = 100
BETAS = BETA_SCHEDULES["linear"](T, 1e-3, 0.2)
ALPHA_BAR = cumulative_alpha(BETAS)  # ends at 2e-5
MU, STD = 0.4, 0.5  # of the Gaussian data
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
    return Prediction(x0, (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5, torch.full_like(x, 0.3))


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


def ddpm_moments(grid, eta, large):
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
            noise = 1 - alpha if large else small
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


EXACT = {
    "fixed-large": lambda grid, eta: ddpm_moments(grid, eta, large=True),
    "fixed-small": lambda grid, eta: ddpm_moments(grid, eta, large=False),
    "ddim": ddim_moments,
}


@pytest.mark.parametrize("S", [1, 2, 5, 10, 50, T])
@every_skip_type
@pytest.mark.parametrize(("name", "eta"), [case for case in CASES if case[0] in EXACT])
def test_moments_for_gaussian_data(name, eta, skip_type, S):
    grid = time_grid(ALPHA_BAR, skip_type, S)
    offset, gain, noise_gains = affine_map(name, optimal(ALPHA_BAR), grid, eta)
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
    """Against the exact probability flow down to t = 0 (the step from there to the data is first order for all)."""
    alpha_bar = cumulative_alpha(BETA_SCHEDULES["linear"](1000, 1e-4, 0.02))
    total = lambda ab: ab * STD**2 + 1 - ab
    exact = math.sqrt(total(alpha_bar[0].item()) / total(alpha_bar[-1].item()))
    errors = []
    for S in (51, 101):
        _, gain, noise_gains = affine_map(name, optimal(alpha_bar), time_grid(alpha_bar, "linspace", S), 0.0, step=-2)
        assert not any(noise_gains)
        errors.append(abs(gain - exact))
    assert math.log2(errors[0] / errors[1]) > SAMPLERS[name].order - 0.25


# --- contracts of every sampler ---


@every_skip_type
@every_case
def test_an_oracle_recovers_x0(name, eta, skip_type):
    """The last step must reach alpha_bar = 1; without clipping, and also where alpha_bar_T = 0."""
    x0 = 1.5 * normal(2, 3, 2, 2, seed=3)
    for alpha_bar in (ALPHA_BAR, rescale_zero_terminal_snr(ALPHA_BAR)):
        for S in (1, 2, 7, 30, T):
            grid = time_grid(alpha_bar, skip_type, S)
            denoise = lambda x, t: prediction(x, x0, alpha_bar[t].item())
            steps = run(name, denoise, normal(2, 3, 2, 2), grid, eta=eta)
            torch.testing.assert_close(steps[-1].x, x0, rtol=1e-9, atol=1e-9)
            assert all(torch.equal(step.x0, x0) for step in steps)


@every_skip_type
def test_an_oracle_network_recovers_x0_through_the_process(skip_type):
    process, x0 = GaussianDiffusion(ALPHA_BAR), normal(2, 3, 2, 2, seed=3)
    for S in (1, 10, T):
        denoise = lambda x, t: process.predict(
            (x - ALPHA_BAR[t].sqrt() * x0) / (1 - ALPHA_BAR[t]).sqrt(), x, t, clip=False
        )
        for name, eta in CASES:
            if not SAMPLERS[name].needs_variance:
                grid = time_grid(ALPHA_BAR, skip_type, S)
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
    evals = SAMPLERS[name].evals_per_step
    assert evals * S - (evals - 1) <= len(calls) <= evals * S  # the last step may need only one


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


# --- diffusers, step for step ---

OUTPUTS = [("pred_eps", True), ("pred_eps", False), ("pred_x0", True), ("pred_v", False)]
THEIR_NAMES = {"pred_eps": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def scheduler_of(kind, objective, clip, **options):
    """With our float64 alpha_bar: theirs is float32, which costs 1 - alpha_bar_t / alpha_bar_prev four digits."""
    scheduler = kind(
        T, trained_betas=BETAS.numpy(), prediction_type=THEIR_NAMES[objective], clip_sample=clip, **options
    )
    torch.testing.assert_close(scheduler.alphas_cumprod, ALPHA_BAR.float(), rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = ALPHA_BAR
    return scheduler


def recorded(objective, clip):
    """A denoiser in float32, and the list of the network outputs that it saw."""
    process, outputs = GaussianDiffusion(ALPHA_BAR, objective), []

    def denoise(x, t):
        outputs.append(torch.tanh(1.3 * x + math.sin(t)) + 0.2)
        return process.predict(outputs[-1], x, t, clip)

    return denoise, outputs


@pytest.mark.parametrize(("objective", "clip"), OUTPUTS)
@every_skip_type
@pytest.mark.parametrize("name", ["fixed-small", "fixed-large"])
def test_ancestral_sampling_equals_diffusers(name, skip_type, objective, clip):
    for S in (1, 10, 35, T):
        grid = time_grid(ALPHA_BAR, skip_type, S)
        if name == "fixed-large" and grid.t[-2] > 0:
            continue  # theirs adds noise at a last step from t > 0, because it asks for t > 0 and not for t_prev >= 0
        x = normal(2, 3, 4, 4, dtype=torch.float32)
        denoise, outputs = recorded(objective, clip)
        steps = run(name, denoise, x, grid, Noise(x.shape, seed=5, dtype=torch.float32))

        scheduler = scheduler_of(DDPMScheduler, objective, clip, variance_type=name.replace("-", "_"))
        scheduler.set_timesteps(timesteps=grid.t.tolist()[:-1])
        generator = torch.Generator().manual_seed(5)
        for t, out, step in zip(scheduler.timesteps, outputs, steps, strict=True):
            theirs = scheduler.step(out, int(t), x, generator=generator)
            torch.testing.assert_close(step.x, theirs.prev_sample, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step.x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
            x = step.x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("objective", "clip"), OUTPUTS)
def test_ddim_equals_diffusers(objective, clip, eta):
    """Where S divides T only: elsewhere theirs takes a wrong previous timestep."""
    for S in (1, 5, 20, T):
        grid, x = time_grid(ALPHA_BAR, "uniform", S), normal(2, 3, 4, 4, dtype=torch.float32)
        denoise, outputs = recorded(objective, clip)
        noise = Noise(x.shape, dtype=torch.float32)
        steps = run("ddim", denoise, x, grid, noise, eta)

        scheduler = scheduler_of(DDIMScheduler, objective, clip, set_alpha_to_one=True)
        scheduler.set_timesteps(S)
        assert scheduler.timesteps.tolist() == grid.t.tolist()[:-1]
        draws = [*noise.draws, torch.zeros_like(x)] if eta else [None] * S
        for t, out, draw, step in zip(scheduler.timesteps, outputs, draws, steps, strict=True):
            theirs = scheduler.step(out, int(t), x, eta=eta, use_clipped_model_output=True, variance_noise=draw)
            torch.testing.assert_close(step.x, theirs.prev_sample, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step.x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
            x = step.x
