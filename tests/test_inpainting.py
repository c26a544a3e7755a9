"""Inpainting: what is known stays, what is filled in agrees with it, and resampling is what makes it agree."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusions.generate import generate
from diffusions.inpainting import inpainting
from diffusions.pixels import to_uint8, to_unit
from diffusions.process import GaussianDiffusion, Prediction
from diffusions.samplers import SAMPLERS, Step
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha, rescale_zero_terminal_snr, time_grid

MU = torch.tensor([0.1, -0.2], dtype=torch.float64)  # of two pixels
STD, RHO = 0.5, 0.9  # of each, and their correlation
COVARIANCE = STD**2 * torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)
RIGHT = torch.tensor([[False, True]])  # the right pixel is unknown
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def schedule(T):
    """Linear betas that end near alpha_bar = 5e-4, whatever T."""
    return cumulative_alpha(BETA_SCHEDULES["linear"](T, 0.1 / T, 15 / T))


class Noise:
    """randn() of one batch; counts its draws."""

    def __init__(self, shape, seed=1):
        self.generator, self.shape, self.n = torch.Generator().manual_seed(seed), shape, 0

    def __call__(self):
        self.n += 1
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


def optimal(alpha_bar):
    """E[x0 | x_t] of the two pixels."""

    def denoise(x, t):
        ab = alpha_bar[t].item()
        gain = ab**0.5 * torch.linalg.solve(ab * COVARIANCE + (1 - ab) * torch.eye(2).double(), COVARIANCE)
        x0 = (MU + (x.flatten(1) - ab**0.5 * MU) @ gain).view_as(x)
        return Prediction(x0, (x - ab**0.5 * x0) / (1 - ab) ** 0.5, torch.full_like(x, 0.3))

    return denoise


def fill(name, known, T, n_resample, randn=None):
    """The right pixel for each of the known left ones [B]; what stands there before must not matter."""
    images = torch.stack([known, torch.full_like(known, 7.0)], dim=1).view(-1, 1, 1, 2)
    alpha_bar, indices = schedule(T), torch.arange(len(known))
    walk = inpainting(images.__getitem__, RIGHT, n_resample)
    *_, last = walk(
        SAMPLERS[name], optimal(alpha_bar), indices, time_grid(alpha_bar, "uniform", None), randn or Noise(images.shape)
    )
    assert torch.equal(last.x[..., 0], images[..., 0])
    return last.x[:, 0, 0, 1]


# --- two correlated Gaussian pixels: what must be filled in is known ---


@every_sampler
def test_the_conditional_mean_is_approached(name):
    """Without noise the filled pixel is affine in the known one; its slope is to become the correlation."""
    silence = lambda: torch.zeros(2, 1, 1, 2, dtype=torch.float64)
    slopes = []
    for n_resample in (1, 3, 20):
        at_mean, above = fill(name, MU[0] + torch.tensor([0.0, 1.0]).double(), 50, n_resample, silence)
        assert at_mean.item() == pytest.approx(MU[1].item(), abs=0.003)
        slopes.append((above - at_mean).item())
    assert slopes == sorted(slopes)
    assert slopes[0] < 0.7 * RHO, "one pass is known not to agree (Lugmayr et al. 2022, section 4.2)"
    assert slopes[-1] == pytest.approx(RHO, abs=0.05)


def test_the_conditional_distribution_is_approached():
    """fixed-small and fixed-large bound the variance from both sides, as they do in plain sampling."""
    known = MU[0] + STD * torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred, spread, slope = known - MU[0], {}, {}
    for name, n_resample in [("fixed-small", 10), ("fixed-large", 10), ("fixed-large", 1)]:
        filled = fill(name, known, 50, n_resample) - MU[1]
        slope[name, n_resample] = ((centred * filled).sum() / centred.square().sum()).item()
        spread[name, n_resample] = (filled - slope[name, n_resample] * centred).var().item()
        assert abs(filled.mean()) < 0.03
    expected = STD**2 * (1 - RHO**2)
    assert 0.6 * expected < spread["fixed-small", 10] < expected < spread["fixed-large", 10] < 1.35 * expected
    assert spread["fixed-large", 1] > 1.7 * expected and slope["fixed-large", 1] < 0.7
    assert all(slope[name, 10] == pytest.approx(RHO, abs=0.07) for name in ("fixed-small", "fixed-large"))


def test_the_walk_is_algorithm_1():
    """Lugmayr et al. 2022, with DDPM's steps from the betas themselves; the noise is drawn in the walk's order."""
    T, U = 8, 3
    betas = BETA_SCHEDULES["linear"](T, 0.1 / T, 5 / T)
    alpha_bar, images = cumulative_alpha(betas), torch.linspace(-1, 1, 12).double().view(3, 1, 2, 2)
    hole = torch.tensor([[True, False], [False, True]])
    eps = lambda x, t: torch.tanh(1.3 * x + t)

    def denoise(x, t):
        noise = (1 - alpha_bar[t].item()) ** 0.5
        return Prediction((x - noise * eps(x, t)) / alpha_bar[t].item() ** 0.5, eps(x, t), None)

    z, x0 = Noise((2, 1, 2, 2)), images[[2, 0]]
    x = z()
    for t in reversed(range(T)):
        for u in range(U if t > 0 else 1):
            if u > 0:
                x = (1 - betas[t]).sqrt() * x + betas[t].sqrt() * z()
            x = (x - betas[t] / (1 - alpha_bar[t]).sqrt() * eps(x, t)) / (1 - betas[t]).sqrt()
            if t > 0:
                x = x + betas[t].sqrt() * z()
            prev = alpha_bar[t - 1] if t > 0 else torch.ones(())
            known = prev.sqrt() * x0 + ((1 - prev).sqrt() * z() if t > 0 else 0)
            x = torch.where(hole, x, known)
    walk = inpainting(images.__getitem__, hole, U)
    grid, noise = time_grid(alpha_bar, "uniform", None), Noise((2, 1, 2, 2))
    steps = list(walk(SAMPLERS["fixed-large"], denoise, torch.tensor([2, 0]), grid, noise))
    torch.testing.assert_close(steps[-1].x, x, rtol=1e-9, atol=1e-9)
    assert noise.n == z.n and [step.t for step in steps] == list(reversed(range(T)))


# --- contracts, for every sampler ---


@pytest.mark.parametrize("S", [1, 2, 7])
@every_sampler
def test_the_known_pixels_stay_and_an_oracle_fills_the_rest(name, S):
    """Bit for bit, also where alpha_bar_T = 0; every step is yielded once, at the grid's timesteps."""
    T, shape = 30, (2, 3, 4, 4)
    truth, images = Noise(shape, 5)(), Noise((4, *shape[1:]), 6)()
    hole = torch.arange(16).view(4, 4) % 3 == 0
    for alpha_bar in (schedule(T), rescale_zero_terminal_snr(schedule(T))):
        asked, grid, noise = [], time_grid(alpha_bar, "trailing", S), Noise(shape)

        def denoise(x, t):
            asked.append(t)
            ab = alpha_bar[t].item()
            return Prediction(truth, (x - ab**0.5 * truth) / (1 - ab) ** 0.5, torch.full_like(x, 0.3))

        steps = list(
            inpainting(images.__getitem__, hole, 3)(SAMPLERS[name], denoise, torch.tensor([3, 1]), grid, noise)
        )
        assert all(type(step) is Step for step in steps) and [s.t for s in steps] == grid.t.tolist()[:-1]
        assert torch.equal(steps[-1].x[..., ~hole], images[[3, 1]][..., ~hole])
        torch.testing.assert_close(steps[-1].x[..., hole], truth[..., hole], rtol=1e-9, atol=1e-9)
        assert set(asked) == set(grid.t.tolist()[:-1])
        draws_of_step = 2 + SAMPLERS[name].stochastic  # of x, of the known part, and by the sampler
        assert noise.n == 1 + max(0, S - 1) * (3 * draws_of_step - 1)


def test_multistep_samplers_act_at_first_order():
    """A step that is made again has no history; DDIM is the first step of both."""
    known = torch.linspace(-1, 1, 5).double()
    ddim = fill("ddim", known, 20, 4)
    for name in ("dpm++2m", "unipc"):
        torch.testing.assert_close(fill(name, known, 20, 4), ddim, rtol=1e-9, atol=1e-9)
    assert (fill("heun", known, 20, 4) - ddim).abs().max() > 1e-3


# --- through `generate` ---


class Network(nn.Module):
    """Something fixed that sees its neighbours, with as many outputs as the variance needs."""

    in_channels, image_size = 3, 8

    def __init__(self, n_out):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, n_out, 3, padding=1))

    def forward(self, x, t):
        return self.body(x + 0.01 * t.view(-1, 1, 1, 1))


IMAGES = torch.randint(0, 256, (9, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
HOLE = torch.zeros(8, 8, dtype=torch.bool)
HOLE[2:6, 3:] = True


def filled(name, indices=range(9), seed=1, micro_batch=4, n_resample=3, images=IMAGES, **more):
    learns = SAMPLERS[name].needs_variance
    process = GaussianDiffusion(schedule(40), "pred_v", learn_variance=learns)
    options = SimpleNamespace(sampler=name, skip_type="trailing", skip_steps=6, eta=0.0, clip_denoised=True)
    walk = inpainting(to_unit(images).__getitem__, HOLE, n_resample)
    network = Network(6 if learns else 3)
    batches = list(generate(network, process, options, indices, seed, micro_batch, walk=walk, **more))
    return torch.cat([batch.images for batch in batches]), batches


@every_sampler
def test_inpainted_images(name):
    images, _ = filled(name)
    assert torch.equal(images[..., ~HOLE], IMAGES[..., ~HOLE])
    others = [filled(name, seed=2)[0], filled(name, n_resample=1)[0]]
    assert all((images[..., HOLE] != other[..., HOLE]).float().mean() > 0.3 for other in others)
    some, _ = filled(name, [7, 2, 4], micro_batch=2)
    assert (some.int() - images[[7, 2, 4]].int()).abs().max() <= 1
    painted = IMAGES.masked_fill(HOLE, 200)
    assert torch.equal(filled(name, images=painted)[0], images), "what lies under the mask showed through"


def test_the_frames_of_inpainting():
    images, (batch, *_) = filled("ddim", n_frames=6, micro_batch=9)
    assert batch.frames.shape == (9, 6, 3, 8, 8) and torch.equal(batch.frames[:, -1], images)
    noisy = batch.frames[:, 0][..., ~HOLE]
    assert not torch.equal(noisy, to_uint8(to_unit(IMAGES))[..., ~HOLE]), "the known part is noised on the way"
