"""Samplers against diffusers' schedulers, step for step."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_samplers import ALPHA_BAR, BETAS, Noise, T, every_skip_type, normal, run

from diffusions.process import GaussianDiffusion
from diffusions.samplers import SAMPLERS
from diffusions.schedules import time_grid

OUTPUTS = [("pred_eps", True), ("pred_eps", False), ("pred_x0", True), ("pred_v", False)]
THEIR_NAMES = {"pred_eps": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def scheduler_of(kind, objective, **options):
    """With our float64 alpha_bar: theirs is float32, which costs 1 - alpha_bar_t / alpha_bar_prev four digits."""
    scheduler = kind(T, trained_betas=BETAS.numpy(), prediction_type=THEIR_NAMES[objective], **options)
    torch.testing.assert_close(scheduler.alphas_cumprod, ALPHA_BAR.float(), rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = ALPHA_BAR
    return scheduler


def recorded(objective, clip, learn_variance=False):
    """A denoiser, and the list of the network outputs that it saw."""
    process, outputs = GaussianDiffusion(ALPHA_BAR, objective, learn_variance), []

    def denoise(x, t):
        out = torch.tanh(1.3 * x + math.sin(t)) + 0.2
        outputs.append(torch.cat([out, torch.sin(3 * x + t)], dim=1) if learn_variance else out)
        return process.predict(outputs[-1], x, t, clip)

    return denoise, outputs


@pytest.mark.parametrize(("objective", "clip"), OUTPUTS)
@every_skip_type
@pytest.mark.parametrize("name", ["fixed-small", "fixed-large", "learned-range"])
def test_ancestral_sampling_equals_diffusers(name, skip_type, objective, clip):
    for S in (1, 10, 35, T):
        grid = time_grid(ALPHA_BAR, skip_type, S)
        if name != "fixed-small" and grid.t[-2] > 0:
            continue  # theirs adds noise at a last step from t > 0, because it asks for t > 0 and not for t_prev >= 0
        x = normal(2, 3, 4, 4, dtype=torch.float32)
        denoise, outputs = recorded(objective, clip, SAMPLERS[name].needs_variance)
        steps = run(name, denoise, x, grid, Noise(x.shape, seed=5, dtype=torch.float32))

        scheduler = scheduler_of(DDPMScheduler, objective, clip_sample=clip, variance_type=name.replace("-", "_"))
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

        scheduler = scheduler_of(DDIMScheduler, objective, clip_sample=clip, set_alpha_to_one=True)
        scheduler.set_timesteps(S)
        assert scheduler.timesteps.tolist() == grid.t.tolist()[:-1]
        draws = [*noise.draws, torch.zeros_like(x)] if eta else [None] * S
        for t, out, draw, step in zip(scheduler.timesteps, outputs, draws, steps, strict=True):
            theirs = scheduler.step(out, int(t), x, eta=eta, use_clipped_model_output=True, variance_noise=draw)
            torch.testing.assert_close(step.x, theirs.prev_sample, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step.x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)
            x = step.x


@pytest.mark.parametrize(("objective", "clip"), OUTPUTS)
@every_skip_type
def test_heun_equals_diffusers(skip_type, objective, clip):
    """Theirs walks y = x / sqrt(alpha_bar) and is called once for each evaluation of the network."""
    for S in (1, 2, 5, 20, T):
        grid, x = time_grid(ALPHA_BAR, skip_type, S), normal(2, 3, 4, 4)
        denoise, outputs = recorded(objective, clip)
        steps = run("heun", denoise, x, grid)

        scheduler = scheduler_of(HeunDiscreteScheduler, objective, clip_sample=clip)
        scheduler.set_timesteps(timesteps=grid.t.tolist()[:-1])
        sigmas = (1 / grid.alpha_bar - 1).sqrt()
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        ys = [x / grid.alpha_bar[0].sqrt()]
        for t, out in zip(scheduler.timesteps, outputs, strict=True):
            ys.append(scheduler.step(out, t, ys[-1]).prev_sample)
        ends = [*ys[2::2], ys[-1]]  # theirs at even counts are corrected; the last step is Euler's
        for ab_prev, end, step in zip(grid.alpha_bar[1:], ends, steps, strict=True):
            torch.testing.assert_close(step.x, ab_prev.sqrt() * end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", THEIR_NAMES)
@every_skip_type
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("dpm++2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
        ("unipc", UniPCMultistepScheduler, {"solver_type": "bh2", "predict_x0": True}),
    ],
)
def test_multistep_solvers_equal_diffusers(name, kind, options, skip_type, objective):
    for S in (1, 2, 5, 20, T):
        grid, x = time_grid(ALPHA_BAR, skip_type, S), normal(2, 3, 4, 4, dtype=torch.float32)
        denoise, outputs = recorded(objective, clip=False)
        steps = run(name, denoise, x, grid)

        scheduler = scheduler_of(kind, objective, solver_order=2, final_sigmas_type="zero", **options)
        scheduler.set_timesteps(S)
        scheduler.timesteps, scheduler.sigmas = grid.t[:-1], (1 / grid.alpha_bar - 1).sqrt()
        for t, out, step in zip(scheduler.timesteps, outputs, steps, strict=True):
            theirs = scheduler.step(out, t, x).prev_sample
            torch.testing.assert_close(step.x, theirs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(step.x0, scheduler.model_outputs[-1], rtol=1e-5, atol=1e-5)
            x = step.x
