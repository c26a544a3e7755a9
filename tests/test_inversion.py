"""Encoding an image into x_T: against the exact probability flow of Gaussian data, and back through DDIM."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from diffusions.generate import denoiser
from diffusions.inversion import encode
from diffusions.pixels import to_unit
from diffusions.process import Prediction, build_process
from diffusions.samplers import SAMPLERS
from diffusions.schedules import BETA_SCHEDULES, SKIP_TYPES, cumulative_alpha, rescale_zero_terminal_snr, time_grid

T = 1000
ALPHA_BAR = cumulative_alpha(BETA_SCHEDULES["linear"](T, 1e-4, 0.02))
ZERO_TERMINAL = rescale_zero_terminal_snr(ALPHA_BAR)
COSINE = cumulative_alpha(BETA_SCHEDULES["cosine"](T, 0, 0))
MU, STD = 0.4, 0.5  # of the Gaussian data
X0 = torch.tensor([-1.0, -0.3, 0.4, 0.9], dtype=torch.float64).view(4, 1, 1, 1)
schedules = pytest.mark.parametrize("alpha_bar", [ALPHA_BAR, ZERO_TERMINAL, COSINE], ids=["linear", "zero", "cosine"])


def optimal(alpha_bar):
    """The optimal network for data N(MU, STD^2)."""

    def denoise(x, t):
        ab = alpha_bar[t].item()
        x0 = MU + ab**0.5 * STD**2 / (ab * STD**2 + 1 - ab) * (x - ab**0.5 * MU)
        return Prediction(x0, (x - ab**0.5 * x0) / (1 - ab) ** 0.5, None)

    return denoise


def nonlinear(x, t):
    """Some eps; its x0 is not needed."""
    return Prediction(x, torch.tanh(1.3 * x + math.sin(t)) + 0.2, None)


def decode(denoise, x, grid):
    return list(SAMPLERS["ddim"](denoise, x, grid, None))[-1].x


def exact(x0, ab):
    """Where the probability flow ends: it keeps x's rank among N(sqrt(ab) MU, ab STD^2 + 1 - ab)."""
    return ab**0.5 * MU + (ab * STD**2 + 1 - ab) ** 0.5 * (x0 - MU) / STD


def errors(alpha_bar, skip_type, counts):
    """Largest errors of the latents against the exact ones, and of the images decoded from them; one per count."""
    found = []
    for S in counts:
        grid = time_grid(alpha_bar, skip_type, S)
        latents = encode(optimal(alpha_bar), X0, grid)
        assert latents.isfinite().all()
        back = decode(optimal(alpha_bar), latents, grid)
        wanted = exact(X0, grid.alpha_bar[0].item())
        found.append(((latents - wanted).abs().max().item(), (back - X0).abs().max().item()))
    return zip(*found)


@schedules
@pytest.mark.parametrize("skip_type", ["uniform", "linspace", "quad"])
def test_first_order_convergence(alpha_bar, skip_type):
    counts = (20, 40, 80, 160)
    for error in errors(alpha_bar, skip_type, counts):
        slope = -np.polyfit(np.log(counts), np.log(error), 1)[0]
        assert 0.9 < slope < 1.1


@schedules
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_every_grid_converges(alpha_bar, skip_type):
    for coarse, fine in errors(alpha_bar, skip_type, (40, 160)):
        assert fine < 0.13 and 0.2 < fine / coarse < 0.5


@schedules
def test_all_steps_are_nearly_exact(alpha_bar):
    for (error,) in errors(alpha_bar, "uniform", [T]):
        assert error < 0.01


@pytest.mark.parametrize("S", [1, 2, 9, 40])
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_encoding_is_euler_in_sigma(skip_type, S):
    """Song et al. 2021, eq. 14: y = x / sqrt(alpha_bar) moves by eps dsigma, sigma^2 = (1 - alpha_bar) / alpha_bar."""
    times = time_grid(ALPHA_BAR, skip_type, S).t.tolist()[-2::-1]  # from the data up
    sigmas = [0.0] + [math.sqrt(1 / ALPHA_BAR[t].item() - 1) for t in times]
    y = X0
    for asked, sigma, after in zip([times[0], *times], sigmas, sigmas[1:]):
        y = y + (after - sigma) * nonlinear(y / math.sqrt(1 + sigma**2), asked).eps
    found = encode(nonlinear, X0, time_grid(ALPHA_BAR, skip_type, S))
    torch.testing.assert_close(found, y / math.sqrt(1 + sigmas[-1] ** 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("S", [1, 3, T])
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_a_constant_eps_is_inverted_exactly(skip_type, S):
    """Both directions then walk along the same straight line, whatever the steps."""
    eps = torch.linspace(-1, 1, 4, dtype=torch.float64).view_as(X0)
    constant = lambda x, t: Prediction((x - (1 - ALPHA_BAR[t]) ** 0.5 * eps) / ALPHA_BAR[t] ** 0.5, eps, None)
    grid = time_grid(ALPHA_BAR, skip_type, S)
    latents, ab = encode(constant, X0, grid), grid.alpha_bar[0]
    torch.testing.assert_close(latents, ab**0.5 * X0 + (1 - ab) ** 0.5 * eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decode(constant, latents, grid), X0, rtol=1e-9, atol=1e-9)


@schedules
@pytest.mark.parametrize("S", [1, 2, 10, T])
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_the_network_is_asked_on_the_grid_only(alpha_bar, skip_type, S):
    """Once a step, at its lower end; at the data, where no network is, at the lowest timestep. float32 stays so."""
    calls, grid = [], time_grid(alpha_bar, skip_type, S)
    denoise = lambda x, t: calls.append((t, x.dtype)) or optimal(alpha_bar)(x, t)
    latents = encode(denoise, X0.float(), grid)
    times = grid.t.tolist()[-2::-1]
    assert calls == [(t, torch.float32) for t in [times[0], *times[:-1]]]
    assert latents.dtype == torch.float32 and latents.isfinite().all() and not latents.requires_grad


def test_rows_do_not_see_each_other():
    grid = time_grid(ALPHA_BAR, "quad", 10)
    alone = torch.cat([encode(nonlinear, row[None], grid) for row in X0])
    torch.testing.assert_close(encode(nonlinear, X0, grid), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_trained_network_reconstructs(tmp_path):
    """The error per pixel of digits it has not seen, in [0, 1]^2, in float32: it falls with S, then stays down."""
    from utils.data import load_splits
    from utils.weights import load_network, open_weights

    args = ["--train.n_steps", 300, "--train.batch_size", 64, "--train.valid_every", 300, "--train.sample_every", 300]
    run("train_ddpm.py", "-c", ROOT / "configs/ddpm_digits.yaml", "-e", tmp_path / "run", *args, cwd=tmp_path)
    weights = open_weights(str(tmp_path / "run"), True, [])
    net, process = load_network(weights, "cpu"), build_process(weights.config.diffusion)
    test = load_splits(weights.config.data)["test"]
    x0 = to_unit(torch.stack([test[i] for i in range(8)]))
    denoise, found = denoiser(net, process, clip=True), {}
    for S in (10, 20, 50, 100, 200, T):
        grid = time_grid(process.alpha_bar, "trailing", S)
        with torch.no_grad():
            back = decode(denoise, encode(denoise, x0, grid), grid)
        found[S] = ((back - x0) / 2).square().mean().item()
    assert found[T] < 1e-5, found
    assert found[10] > found[20] > found[50] > found[100], found
    assert all(found[S] <= 1.2 * found[100] for S in (200, T)), found
