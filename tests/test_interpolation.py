"""Interpolation: slerp in closed form, which latents meet where, and ends that are plain samples."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusions.generate import generate
from diffusions.interpolation import interpolation, slerp
from diffusions.noise import randn
from diffusions.process import GaussianDiffusion
from diffusions.samplers import SAMPLERS, Step
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha, time_grid

SHAPE = (3, 8, 8)
SEED = 3
PROCESS = GaussianDiffusion(cumulative_alpha(BETA_SCHEDULES["linear"](50, 2e-3, 0.3)), "pred_v")
GRID = time_grid(PROCESS.alpha_bar, "uniform", 5)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plane(*degrees):
    """Unit vectors [B, 1, 1, 2] at these angles."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]).double()[
        :, None, None
    ]


# --- slerp ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_exact(dtype):
    a, b = (normal(5, *SHAPE, seed=seed, dtype=dtype) for seed in (0, 1))
    assert torch.equal(slerp(a, b, torch.zeros(5)), a)
    assert torch.equal(slerp(a, b, torch.ones(5)), b)
    assert slerp(a, b, torch.full((5,), 0.3)).dtype == dtype


def test_the_angle_grows_evenly_in_the_plane():
    weight = torch.linspace(0, 1, 7)
    for start, end in [(0, 90), (20, 50), (-30, 120), (10, 179), (60, -60)]:
        found = slerp(plane(*[start] * 7), plane(*[end] * 7), weight)
        expected = plane(*(start + (end - start) * w for w in weight.double().tolist()))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_orthogonal_latents_keep_their_norm():
    """Noise of many pixels is nearly orthogonal and of equal norm: between two draws lies something as typical."""
    a, b = normal(1, *SHAPE), normal(1, *SHAPE, seed=1)
    b = b - (a * b).sum() / a.square().sum() * a
    b = b * a.norm() / b.norm()
    weight = torch.linspace(0, 1, 11)
    found = slerp(a.expand(11, *SHAPE), b.expand(11, *SHAPE), weight)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), a.norm().expand(11), rtol=1e-9, atol=0)
    c, s = torch.cos(weight.double() * math.pi / 2), torch.sin(weight.double() * math.pi / 2)
    torch.testing.assert_close(found, c.view(-1, 1, 1, 1) * a + s.view(-1, 1, 1, 1) * b, rtol=1e-6, atol=1e-6)


def test_the_norms_of_the_ends_do_not_change_the_angle():
    """Eq. 67 takes the angle between the two, whatever their lengths, which mix by the same weights."""
    a, b, weight = plane(0), plane(90), torch.tensor([0.25])
    unit, long = slerp(a, b, weight), slerp(2 * a, 3 * b, weight)
    torch.testing.assert_close(long.flatten(), unit.flatten() * torch.tensor([2.0, 3.0]).double())


@pytest.mark.parametrize("factor", [1.0, 2.5, 1 + 1e-12, -1.0])
def test_parallel_latents_are_mixed_linearly(factor):
    """Equal ones stay what they are; there is no single great circle between a and -a."""
    a, weight = normal(4, *SHAPE), torch.tensor([0.0, 0.25, 0.5, 1.0])
    found = slerp(a, factor * a, weight)
    w = weight.double().view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (1 - w) * a + w * factor * a, rtol=1e-9, atol=1e-12)
    assert slerp(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), torch.tensor([0.5])).abs().max() == 0


def test_rows_have_angles_and_weights_of_their_own():
    a, b, weight = normal(4, *SHAPE), normal(4, *SHAPE, seed=1), torch.tensor([0.0, 0.2, 0.7, 1.0])
    b[1] = a[1]  # a parallel one among them
    alone = torch.cat([slerp(a[i : i + 1], b[i : i + 1], weight[i : i + 1]) for i in range(4)])
    assert torch.equal(slerp(a, b, weight), alone)


# --- the walk ---


def noise_of(denoise, indices, grid):
    return randn(SEED, indices, 0, SHAPE)


def starts(indices, n, corners=False, latents=noise_of):
    """The x_T that the sampler is given, item by item."""
    given = []

    def recording(denoise, x, grid, randn):
        given.append(x)
        yield Step(0, x, x)

    list(interpolation(latents, n, corners)(recording, None, torch.tensor(indices), GRID, None))
    return given[0]


def latent(*indices):
    return randn(SEED, torch.tensor(indices), 0, SHAPE)


def test_item_r_n_plus_j_lies_between_latents_2r_and_2r_plus_1():
    n, items = 5, [13, 0, 4, 7, 22, 8]
    found = starts(items, n)
    for x, item in zip(found, items):
        r, j = divmod(item, n)
        assert torch.equal(x[None], slerp(latent(2 * r), latent(2 * r + 1), torch.tensor([j / (n - 1)])))
    assert torch.equal(found[1], latent(0)[0]) and torch.equal(found[2], latent(1)[0])


def test_corners():
    """Image r n^2 + i n + j: row i goes down from latents 4r and 4r + 1 to 4r + 2 and 4r + 3, column j goes across."""
    n = 3
    found = starts(range(2 * n * n), n, corners=True).unflatten(0, (2, n, n))
    for r, square in enumerate(found):
        ends = square[0, 0], square[0, -1], square[-1, 0], square[-1, -1]
        assert all(torch.equal(x, y) for x, y in zip(ends, latent(*range(4 * r, 4 * r + 4))))
        a, b, c, d = latent(*range(4 * r, 4 * r + 4)).split(1)
        half = torch.tensor([0.5])
        top, bottom = slerp(a, b, half), slerp(c, d, half)
        expected = {(0, 1): top, (2, 1): bottom, (1, 0): slerp(a, c, half), (1, 1): slerp(top, bottom, half)}
        for place, x in expected.items():
            torch.testing.assert_close(square[place], x[0])


@pytest.mark.parametrize("corners", [False, True])
def test_each_end_is_asked_for_once(corners):
    """An end may be an encoded image, which costs as much as a sample."""
    asked = []

    def latents(denoise, indices, grid):
        asked.extend(indices.tolist())
        assert denoise is None and grid is GRID
        return noise_of(denoise, indices, grid)

    starts([9, 10, 17, 18], 3, corners, latents)  # squares 1 and 2 of nine; rows 3, 5 and 6 of three
    assert asked == ([4, 5, 6, 7, 8, 9, 10, 11] if corners else [6, 7, 10, 11, 12, 13])


# --- through `generate` ---


class Network(nn.Module):
    in_channels, image_size = 3, 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, t):
        return self.body(x + 0.01 * t.view(-1, 1, 1, 1))


def images(name, indices, micro_batch=32, **more):
    options = SimpleNamespace(sampler=name, skip_type="uniform", skip_steps=6, eta=0.0, clip_denoised=True)
    batches = generate(Network(), PROCESS, options, indices, SEED, micro_batch, **more)
    return torch.cat([batch.images for batch in batches])


def assert_close_pixels(a, b):
    """The promise of float32 across batches of another size."""
    difference = (a.int() - b.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.stochastic])
def test_the_ends_are_plain_samples(name):
    n = 5
    plain = images(name, range(8))
    rows = images(name, range(4 * n), walk=interpolation(noise_of, n, False)).unflatten(0, (4, n))
    assert_close_pixels(rows[:, [0, -1]].flatten(0, 1), plain)
    squares = images(name, range(2 * n * n), walk=interpolation(noise_of, n, True)).unflatten(0, (2, n, n))
    assert_close_pixels(squares[:, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(0, 1), plain)
    steps = (rows[:, 1:].float() - rows[:, :-1].float()).abs().mean((2, 3, 4))
    whole = (rows[:, -1].float() - rows[:, 0].float()).abs().mean((1, 2, 3))
    assert (steps > 0).all() and (steps.amax(1) < whole).all(), "every point lies between its neighbours"
    for micro_batch in (1, 7):
        again = images(name, range(4 * n), micro_batch, walk=interpolation(noise_of, n, False))
        assert_close_pixels(again, rows.flatten(0, 1))
