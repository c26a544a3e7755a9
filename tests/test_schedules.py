"""Beta schedules and time grids against closed forms, independent formulas and diffusers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale

from diffusions.process import build_process
from diffusions.schedules import (
    BETA_SCHEDULES,
    SKIP_TYPES,
    TimeGrid,
    cumulative_alpha,
    half_log_snr,
    rescale_zero_terminal_snr,
    strictly_ascending,
    time_grid,
)

START, END = 1e-4, 0.02
STEPS = {7: range(1, 8), 100: range(1, 101), 1000: (1, 2, 3, 7, 10, 30, 50, 96, 100, 300, 600, 999, 1000)}


def cosine_alpha_bar(u):
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


FORMULAS = {  # beta of step i of T, in Python floats
    "linear": lambda i, T: START + (END - START) * i / (T - 1),
    "cosine": lambda i, T: min(1 - cosine_alpha_bar((i + 1) / T) / cosine_alpha_bar(i / T), 0.999),
    "sigmoid": lambda i, T: START + (END - START) / (1 + math.exp(6 - 12 * i / (T - 1))),
    "quad": lambda i, T: (math.sqrt(START) + (math.sqrt(END) - math.sqrt(START)) * i / (T - 1)) ** 2,
    "const": lambda i, T: END,
    "jsd": lambda i, T: 1 / (T - i),
}
DIFFUSERS = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid", "quad": "scaled_linear"}


def schedule(name, T):
    return BETA_SCHEDULES[name](T, START, END)


@pytest.mark.parametrize("T", [2, 100, 1000])
@pytest.mark.parametrize("name", FORMULAS)
def test_betas_equal_the_formula(name, T):
    expected = torch.tensor([FORMULAS[name](i, T) for i in range(T)], dtype=torch.float64)
    torch.testing.assert_close(schedule(name, T), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_betas_equal_diffusers(name):
    theirs = DDPMScheduler(1000, beta_start=START, beta_end=END, beta_schedule=DIFFUSERS[name]).betas
    torch.testing.assert_close(schedule(name, 1000).float(), theirs, rtol=1e-4, atol=2e-7)  # theirs are float32


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_is_a_variance_in_float64(name, T):
    betas = schedule(name, T)
    assert betas.shape == (T,) and betas.dtype == torch.float64
    assert (betas > 0).all() and (betas <= 1).all()
    alpha_bar = cumulative_alpha(betas.float() if name == "linear" else betas)
    assert alpha_bar.shape == (T,) and alpha_bar.dtype == torch.float64
    assert (alpha_bar >= 0).all() and (alpha_bar.diff() < 0).all() and alpha_bar[0] < 1


@pytest.mark.parametrize("name", ["linear", "quad", "sigmoid", "const"])
def test_alpha_bar_is_the_product_to_float64_accuracy(name):
    betas = schedule(name, 1000)
    expected = [math.exp(math.fsum(math.log1p(-beta) for beta in betas[: i + 1].tolist())) for i in range(0, 1000, 111)]
    assert cumulative_alpha(betas)[::111].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_alpha_bar_closed_forms(T):
    left = torch.arange(T - 1, -1, -1, dtype=torch.float64) / T
    torch.testing.assert_close(cumulative_alpha(schedule("jsd", T)), left, rtol=1e-9, atol=0)
    assert cumulative_alpha(schedule("jsd", T))[-1] == 0
    cosine = [cosine_alpha_bar((i + 1) / T) / cosine_alpha_bar(0) for i in range(T - 1)]  # the last is capped
    assert cumulative_alpha(schedule("cosine", T))[:-1].tolist() == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "quad", "cosine", "const"])
def test_zero_terminal_snr(name):
    betas = schedule(name, 1000)
    before = cumulative_alpha(betas)
    after = rescale_zero_terminal_snr(before)
    assert after.dtype == torch.float64
    assert after[-1] == 0 and after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    assert (after.diff() < 0).all()
    theirs = torch.cumprod(1 - diffusers_rescale(betas), dim=0)
    torch.testing.assert_close(after, theirs, rtol=1e-9, atol=1e-15)
    root, kept = before.sqrt(), after.sqrt()  # affine in sqrt(alpha_bar)
    torch.testing.assert_close((kept[1:] - kept[0]) / kept[0], (root[1:] - root[0]) / (root[0] - root[-1]))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_build_process(name, zero):
    options = SimpleNamespace(
        beta_schedule=name,
        total_steps=50,
        beta_start=START,
        beta_end=END,
        zero_terminal_snr=zero,
        objective="pred_v",
        learn_variance=True,
        loss_weighting="p2",
    )
    process = build_process(options)
    alpha_bar = cumulative_alpha(schedule(name, 50))
    assert torch.equal(process.alpha_bar, rescale_zero_terminal_snr(alpha_bar) if zero else alpha_bar)
    assert (process.alpha_bar[-1] == 0) == (zero or name == "jsd")
    assert (process.total_steps, process.objective, process.learn_variance) == (50, "pred_v", True)
    assert not torch.equal(process.loss_weights, torch.ones(50))


def test_half_log_snr():
    alpha_bar = torch.tensor([0, 1e-300, 1e-9, 2e-5, 0.3, 0.5, 0.9999, 1 - 1e-9, 1], dtype=torch.float64)
    lambdas = half_log_snr(alpha_bar)
    assert lambdas.dtype == torch.float64 and lambdas[0] == -math.inf and lambdas[-1] == math.inf
    expected = [math.log(math.sqrt(ab) / math.sqrt(1 - ab)) for ab in alpha_bar.tolist()[1:-1]]
    assert lambdas[1:-1].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    torch.testing.assert_close(torch.sigmoid(2 * lambdas), alpha_bar)


def linear_alpha_bar(T):
    return cumulative_alpha(schedule("linear", T))


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_grid_has_exactly_the_steps_asked_for(skip_type, T):
    alpha_bar = linear_alpha_bar(T)
    for S in STEPS[T]:
        grid = time_grid(alpha_bar, skip_type, S)
        assert isinstance(grid, TimeGrid) and len(grid) == S
        assert grid.t.dtype == torch.int64 and grid.t.shape == grid.alpha_bar.shape == (S + 1,)
        assert (grid.t.diff() < 0).all() and grid.t[0] <= T - 1 and grid.t[-2] >= 0 and grid.t[-1] == -1, S
        assert grid.alpha_bar.dtype == torch.float64 and grid.alpha_bar[-1] == 1
        assert torch.equal(grid.alpha_bar[:-1], alpha_bar[grid.t[:-1]])

        t, ab = grid.t.tolist(), grid.alpha_bar.tolist()
        steps = list(grid)
        assert steps == [(t[i], t[i + 1], ab[i], ab[i + 1]) for i in range(S)] == list(grid), "not iterable twice"
        assert all(type(value) is kind for step in steps for value, kind in zip(step, (int, int, float, float)))


@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_all_steps_are_the_training_timesteps(skip_type):
    for S in (None, 100):
        assert time_grid(linear_alpha_bar(100), skip_type, S).t.tolist() == list(range(99, -2, -1))


def ascending(skip_type, S, T):
    return time_grid(linear_alpha_bar(T), skip_type, S).t.flip(0)[1:].tolist()


@pytest.mark.parametrize("T", STEPS)
def test_uniform(T):
    for S in STEPS[T]:
        assert ascending("uniform", S, T) == [math.floor(i * T / S + 1e-9) for i in range(S)]
        if T % S == 0:
            assert ascending("uniform", S, T) == list(range(0, T, T // S))


@pytest.mark.parametrize("T", STEPS)
def test_quad(T):
    checked = 0
    for S in STEPS[T]:
        raw = [int(value) for value in np.linspace(0, np.sqrt(0.8 * T), S) ** 2]
        if len(set(raw)) == S:
            assert ascending("quad", S, T) == raw
            checked += 1
        else:
            assert all(ours >= theirs for ours, theirs in zip(ascending("quad", S, T), raw) if theirs < T - S)
    assert checked >= 3


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_spacings_of_diffusers(spacing, T):
    scheduler, checked = DDIMScheduler(T, timestep_spacing=spacing), 0
    for S in STEPS[T]:
        scheduler.set_timesteps(S)
        theirs = scheduler.timesteps.tolist()
        if len(set(theirs)) == S and min(theirs) >= 0:  # theirs may repeat a timestep, or take one step too many
            assert time_grid(linear_alpha_bar(T), spacing, S).t.tolist()[:-1] == theirs, S
            checked += 1
    assert checked >= 0.8 * len(STEPS[T])


ENDS_AT_ZERO = {  # alpha_bar over T with the last = 0
    "jsd": lambda T: cumulative_alpha(schedule("jsd", T)),
    "rescaled": lambda T: rescale_zero_terminal_snr(linear_alpha_bar(T)),
}


@pytest.mark.parametrize("alpha_bar_of", [linear_alpha_bar, *ENDS_AT_ZERO.values()], ids=["linear", *ENDS_AT_ZERO])
@pytest.mark.parametrize("T", STEPS)
def test_logsnr_runs_from_the_noise_to_timestep_0(alpha_bar_of, T):
    alpha_bar = alpha_bar_of(T)
    assert time_grid(alpha_bar, "logsnr", 1).t.tolist() == [T - 1, -1]
    for S in STEPS[T]:
        t = time_grid(alpha_bar, "logsnr", S).t
        assert len(t) == S + 1 and (t.diff() < 0).all() and t[0] == T - 1, S
        assert t[-2] == 0 or S == 1


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_logsnr_of_the_shortest_schedules(name):
    assert time_grid(cumulative_alpha(schedule(name, 1)), "logsnr", 1).t.tolist() == [0, -1]
    for S, t in ((1, [1, -1]), (2, [1, 0, -1])):
        assert time_grid(cumulative_alpha(schedule(name, 2)), "logsnr", S).t.tolist() == t


@pytest.mark.parametrize("S", [2, 3, 6, 11, 26, 101, 201, 501, 1001])
def test_logsnr_is_even_where_lambda_is_linear(S):
    alpha_bar = torch.sigmoid(2 * torch.linspace(4, -6, 1001, dtype=torch.float64))
    assert time_grid(alpha_bar, "logsnr", S).t.flip(0)[1:].tolist() == list(range(0, 1001, 1000 // (S - 1)))


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid", "quad", "const"])
def test_logsnr_is_even_in_lambda_to_the_rounding(name):
    """Half the distance between timesteps, but for those that others pushed off either end."""
    alpha_bar, checked = cumulative_alpha(schedule(name, 1000)), 0
    lambdas = [math.log(ab / (1 - ab)) / 2 for ab in alpha_bar.tolist()]
    for S in (3, 5, 10, 20, 50, 200):
        for i, t in enumerate(time_grid(alpha_bar, "logsnr", S).t.flip(0)[1:].tolist()):
            if i < t < 1000 - S + i:
                wanted = lambdas[0] + (lambdas[-1] - lambdas[0]) * i / (S - 1)
                distance = max(lambdas[t - 1] - lambdas[t], lambdas[t] - lambdas[t + 1])
                assert abs(lambdas[t] - wanted) <= distance / 2 + 1e-9, S
                checked += 1
    assert checked > 100


def test_logsnr_equals_diffusers():
    scheduler = DPMSolverMultistepScheduler(1000, use_lu_lambdas=True)
    scheduler.alphas_cumprod = linear_alpha_bar(1000)  # theirs is float32, which moves a rounding
    for S in STEPS[1000][1:]:
        scheduler.set_timesteps(S)
        theirs = scheduler.timesteps.flip(0).tolist()
        for i, t in enumerate(ascending("logsnr", S, 1000)):
            assert t == min(max(theirs[i], i), 1000 - S + i), S  # theirs repeats timesteps at both ends


@pytest.mark.parametrize(
    ("raw", "T", "expected"),
    [
        ([0, 0, 0, 5, 5], 10, [0, 1, 2, 5, 6]),
        ([8, 9, 9, 9], 10, [6, 7, 8, 9]),
        ([0, 3, 3, 4, 9], 10, [0, 3, 4, 5, 9]),
        ([0, 0, 0, 0], 4, [0, 1, 2, 3]),
        ([2, 4, 7], 8, [2, 4, 7]),
        ([5], 8, [5]),
    ],
)
def test_duplicates_are_moved_apart(raw, T, expected):
    assert strictly_ascending(torch.tensor(raw), T).tolist() == expected


@pytest.mark.parametrize("S", [-1, 0, 101])
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_a_wrong_number_of_steps_is_refused(skip_type, S):
    with pytest.raises(ValueError, match=rf"skip_steps = {S}\b.*\b1 to 100\b"):
        time_grid(linear_alpha_bar(100), skip_type, S)


def test_a_wrong_skip_type_is_refused():
    with pytest.raises(ValueError, match="'cubic'") as error:
        time_grid(linear_alpha_bar(100), "cubic", 10)
    assert all(name in str(error.value) for name in SKIP_TYPES)
