"""Classifier-free guidance against the formula, on networks whose every output is known."""

from types import SimpleNamespace

import pytest
import torch
from in_process import KEYS
from torch import Tensor, nn

from diffusions import GaussianDiffusion, generate
from diffusions.generate import denoiser, trajectory
from diffusions.guidance import UNGUIDED, Guidance, guided, mix
from diffusions.noise import randn
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha
from models import build_model
from utils import config

ALPHA_BAR = cumulative_alpha(BETA_SCHEDULES["linear"](100, 1e-3, 0.15))
PROCESS = GaussianDiffusion(ALPHA_BAR)
CLASSES = ["a", "b", "c"]
T = torch.tensor


def network(condition: str, **more: object) -> nn.Module:
    """A small network with random weights everywhere."""
    keys = KEYS | {"model.condition": condition, "model.text_dim": 32, "model.text_length": 12, **more}
    keys |= {"model.classes": CLASSES} if condition == "class" else {"model.cross_attn_resolutions": [4, 8]}
    cfg = config.merge(("test", keys))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build_model(cfg.model, 8, 1, cfg.diffusion.learn_variance)
        for value in net.parameters():
            value.data += 0.1 * torch.randn_like(value)
    return net.eval().requires_grad_(False)


def cond_of(condition: str) -> dict[str, Tensor]:
    if condition == "class":
        return {"label": T([0, 2, 1, 0])}
    from models.conditioning import tokenize

    return {"tokens": tokenize(["a", "bee", "the letter", "a"], 12)}


class Counted(nn.Module):
    """Passes calls on, and keeps how many images each had."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, []

    def null(self, n: int) -> dict[str, Tensor]:
        return self.net.null(n)

    def encode(self, **cond: Tensor) -> dict[str, Tensor]:
        return self.net.encode(**cond)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.net(x, t, **cond)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_scale_1_is_the_conditional_and_scale_0_the_unconditional_network_bit_for_bit(condition: str) -> None:
    net, cond = Counted(network(condition)), cond_of(condition)
    x, steps = randn(0, torch.arange(4), 0, (1, 8, 8)), torch.full((4,), 7)
    conditional, unconditional = net.net(x, steps, **cond), net.net(x, steps)
    assert not torch.equal(conditional, unconditional)
    assert torch.equal(guided(net, cond, Guidance(1.0), ALPHA_BAR)(x, 7), conditional)
    assert torch.equal(guided(net, cond, Guidance(0.0), ALPHA_BAR)(x, 7), unconditional)
    assert torch.equal(guided(net, None, Guidance(5.0), ALPHA_BAR)(x, 7), unconditional)
    assert net.calls == [4, 4, 4]  # one branch each


@pytest.mark.parametrize("condition", ["class", "text"])
def test_scale_0_draws_what_no_condition_draws_in_bf16_too(condition: str) -> None:
    net, how = network(condition), options(guidance_scale=0.0, skip_steps=2)
    draw = lambda cond: list(trajectory(net, PROCESS, how, torch.arange(4), 0, cond, torch.bfloat16))[-1].x
    assert torch.equal(draw(cond_of(condition)), draw(None))
    how.guidance_scale = 1.0
    assert not torch.equal(draw(cond_of(condition)), draw(None))


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_the_batched_pair_equals_two_calls(condition: str, scale: float) -> None:
    net, cond = Counted(network(condition)), cond_of(condition)
    x, steps = randn(0, torch.arange(4), 0, (1, 8, 8)), torch.full((4,), 7)
    found = guided(net, cond, Guidance(scale), ALPHA_BAR)(x, 7)
    assert net.calls == [8]
    wanted = torch.lerp(net.net(x, steps), net.net(x, steps, **cond), scale)
    assert (found - wanted).abs().max() <= 1e-6 * max(1.0, scale) * wanted.abs().max()


class Gaussians(nn.Module):
    """The exact eps of data whose class c is N(means[c], var), and of the whole: N(0, var_of_all) or their mixture."""

    in_channels, image_size = 1, 1

    def __init__(self, means: list[float], var: float, var_of_all: float | None = None) -> None:
        super().__init__()
        self.means, self.var, self.var_of_all = T(means, dtype=torch.float64), var, var_of_all
        self.anchor = nn.Parameter(torch.zeros(()))

    def null(self, n: int) -> dict[str, Tensor]:
        return {"label": torch.full((n,), len(self.means))}

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        label = self.null(len(x))["label"] if label is None else label
        ab = ALPHA_BAR[t][:, None]
        pixels = x.flatten(1).double()
        each = pixels - ab**0.5 * self.means  # [B, classes]
        var = ab * self.var + 1 - ab
        shares = (-(each**2) / (2 * var)).softmax(1)
        score = -(shares * each).sum(1, keepdim=True) / var
        if self.var_of_all is not None:
            score = -pixels / (ab * self.var_of_all + 1 - ab)
        of_class = -each.gather(1, label.clamp(max=len(self.means) - 1)[:, None]) / var
        score = torch.where(label[:, None] < len(self.means), of_class, score)
        return (-((1 - ab) ** 0.5) * score).to(x.dtype).view_as(x)


def options(**more: object) -> SimpleNamespace:
    base = {"sampler": "ddim", "skip_type": "uniform", "skip_steps": None, "eta": 0.0, "clip_denoised": False}
    return SimpleNamespace(**base | more)


def drawn(net: nn.Module, label: int, n: int = 2000, **more: object) -> Tensor:
    """Final x of n images, [n] float64."""
    cond = {"label": torch.full((n,), label)}
    *_, last = trajectory(net, PROCESS, options(**more), torch.arange(n), 3, cond)
    return last.x.flatten().double()


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m", "fixed-small"])
def test_guidance_between_equal_gaussians_moves_the_mean_by_the_scale(scale: float, sampler: str) -> None:
    """p(x|c)^w p(x)^(1-w) of N(m, v) and N(0, v) is N(w m, v): the same images as from that Gaussian, unguided."""
    guided_ones = drawn(Gaussians([0.8], 0.25, 0.25), 0, guidance_scale=scale, sampler=sampler)
    plain = drawn(Gaussians([0.8 * scale], 0.25), 0, sampler=sampler)
    assert (guided_ones - plain).abs().max() < 2e-5
    assert guided_ones.mean().item() == pytest.approx(0.8 * scale, abs=0.08)


@pytest.mark.parametrize("scale", [0.3, 2.0, 4.0])
def test_guided_eps_of_a_mixture_is_the_formula(scale: float) -> None:
    """score = (1 - w) score of the mixture + w score of the class, from densities that autograd differentiates."""
    means, var, t = [-1.0, 0.5, 2.0], 0.3, 40
    ab = ALPHA_BAR[t].item()
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    spread = ab * var + 1 - ab
    log_p = [-((x - ab**0.5 * m) ** 2) / (2 * spread) for m in means]
    whole = torch.logsumexp(torch.stack(log_p), 0)
    (wanted,) = torch.autograd.grad(((1 - scale) * whole + scale * log_p[2]).sum(), x)
    cond = {"label": torch.full((41,), 2)}
    denoise = denoiser(Gaussians(means, var), PROCESS, False, cond=cond, guidance=Guidance(scale))
    eps = denoise(x.detach().view(-1, 1, 1, 1), t).eps.flatten()
    assert torch.allclose(eps, -((1 - ab) ** 0.5) * wanted, rtol=1e-9, atol=1e-9)


def test_guided_samples_leave_the_other_modes_alone_and_go_to_the_far_side() -> None:
    """A class of a mixture: guidance pushes away from the others, to where the class outweighs them most."""
    net = Gaussians([-1.0, 1.0], 0.1)
    plain, strong = (drawn(net, 1, guidance_scale=scale) for scale in (1.0, 4.0))
    assert plain.mean().item() == pytest.approx(1.0, abs=0.03) and strong.min() > plain.min()
    assert strong.mean() > plain.mean()


class Constants(nn.Module):
    """Says `of_cond` where there is a condition, `of_none` where there is none; two channels, for a variance too."""

    in_channels, image_size = 1, 4

    def __init__(self, of_none: float, of_cond: float, channels: int = 1) -> None:
        super().__init__()
        self.values, self.channels = T([of_none, of_cond]), channels
        self.anchor = nn.Parameter(torch.zeros(()))
        self.calls = 0

    def null(self, n: int) -> dict[str, Tensor]:
        return {"on": torch.zeros(n, dtype=torch.int64)}

    def forward(self, x: Tensor, t: Tensor, on: Tensor) -> Tensor:
        self.calls += 1
        return self.values[on].view(-1, 1, 1, 1).expand(-1, self.channels, 4, 4)


def test_outputs_are_mixed_before_clipping() -> None:
    process = GaussianDiffusion(ALPHA_BAR, "pred_x0")
    on = {"on": torch.ones(2, dtype=torch.int64)}
    denoise = denoiser(Constants(-1.5, 1.5), process, True, cond=on, guidance=Guidance(0.6))
    assert denoise(torch.zeros(2, 1, 4, 4), 50).x0.unique().tolist() == pytest.approx([0.3])  # clipped first: 0.2


def test_the_predicted_variance_is_the_conditional_one() -> None:
    on = {"on": torch.ones(2, dtype=torch.int64)}
    found = guided(Constants(0.1, 0.4, channels=2), on, Guidance(3.0), ALPHA_BAR)(torch.zeros(2, 1, 4, 4), 50)
    assert found[:, 0].unique().tolist() == pytest.approx([1.0]) and found[:, 1].unique().tolist() == pytest.approx(
        [0.4]
    )


def test_rescale_gives_the_conditional_spread_back() -> None:
    uncond, cond = (randn(seed, torch.arange(3), 0, (1, 8, 8)) * (1 + seed) for seed in (0, 1))
    spread = lambda value: value.flatten(1).std(1)
    plain, half, full = (mix(uncond, cond, Guidance(4.0, rescale)) for rescale in (0.0, 0.5, 1.0))
    assert torch.equal(plain, torch.lerp(uncond, cond, 4.0)) and (spread(plain) > 1.5 * spread(cond)).all()
    assert torch.allclose(spread(full), spread(cond)) and torch.allclose(half, (plain + full) / 2, atol=1e-6)


def test_guidance_acts_in_its_interval_alone() -> None:
    """Noise levels sigma = sqrt((1 - ab) / ab); outside them one branch, the conditional one."""
    sigma = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
    net, on = Constants(0.0, 1.0), {"on": torch.ones(1, dtype=torch.int64)}
    low, high = sigma[20].item(), sigma[60].item()
    network = guided(net, on, Guidance(3.0, interval=(low, high)), ALPHA_BAR)
    found = [network(torch.zeros(1, 1, 4, 4), t).unique().item() for t in range(100)]
    assert found == [3.0 if 20 <= t <= 60 else 1.0 for t in range(100)]


def test_images_do_not_depend_on_micro_batches_under_guidance() -> None:
    net, cond = network("text"), cond_of("text")
    process = GaussianDiffusion(cumulative_alpha(BETA_SCHEDULES["cosine"](20, 1e-4, 0.02)), "pred_v")
    wanted = {}
    for micro_batch in (4, 3, 1):
        found = generate(net, process, options(guidance_scale=2.0), range(4), 0, micro_batch, cond)
        images = torch.cat([batch.images for batch in found]).int()
        wanted = images if micro_batch == 4 else wanted
        assert (images - wanted).abs().max() <= 1
    rows = lambda indices: {name: value[indices] for name, value in cond.items()}
    found = torch.cat(
        [batch.images for batch in generate(net, process, options(guidance_scale=2.0), range(4), 0, 4, rows)]
    )
    assert torch.equal(found.int(), wanted)


def test_unguided_is_the_default() -> None:
    assert Guidance(1.0, 0.0, None) == UNGUIDED
