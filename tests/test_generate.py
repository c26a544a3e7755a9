"""Generation: image i is a function of (weights, options, seed, i); frames; pixels."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusions.generate import denoiser, frame_steps, generate, trajectory
from diffusions.noise import randn
from diffusions.pixels import to_uint8, to_unit
from diffusions.process import GaussianDiffusion
from diffusions.samplers import SAMPLERS
from diffusions.schedules import BETA_SCHEDULES, cumulative_alpha
from models.unet import UNet

PROCESS = GaussianDiffusion(cumulative_alpha(BETA_SCHEDULES["linear"](50, 2e-3, 0.3)), "pred_v")
STEPS = 6
OPTIONS = SimpleNamespace(sampler="ddim", skip_type="uniform", skip_steps=STEPS, eta=0.0, clip_denoised=True)
INDICES = [*range(14), 2**33, 2**33 + 1]


def options(**changes):
    return SimpleNamespace(**{**vars(OPTIONS), **changes})


def unet(dropout=0.0):
    """A tiny network that does something: the original initialisation gives zero."""
    torch.manual_seed(0)
    network = UNet(8, dim=8, dim_mults=(1, 2), attn_resolutions=(4,), num_res_blocks=1, norm_groups=4, dropout=dropout)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def images(model, indices=INDICES, seed=3, micro_batch=16, opts=OPTIONS, **more):
    batches = list(generate(model, PROCESS, opts, indices, seed, micro_batch, **more))
    assert [len(batch.indices) for batch in batches[:-1]] == [micro_batch] * (len(batches) - 1)
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(indices)
    return torch.cat([batch.images for batch in batches])


def assert_close_pixels(a, b):
    """The promise of float32: at most 1/255 apart, on at most 0.1 % of the pixels."""
    difference = (a.int() - b.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3


@pytest.fixture(scope="module")
def model():
    return unet()


def with_recorded_noise(monkeypatch, function):
    """The result of function(), and what it drew: {(index, draw): row}."""
    drawn = {}

    def recording(seed, index, draw, shape, device):
        rows = randn(seed, index, draw, shape, device)
        drawn.update({(i, draw): row for i, row in zip(index.tolist(), rows)})
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(import_module("diffusions.generate"), "randn", recording)  # the package's name is the function
        return function(), drawn


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if not sampler.needs_variance])
def test_images_do_not_depend_on_the_micro_batch(model, monkeypatch, sampler):
    opts = options(sampler=sampler)
    expected, noise = with_recorded_noise(monkeypatch, lambda: images(model, opts=opts))
    assert expected.shape == (16, 3, 8, 8) and expected.dtype == torch.uint8
    assert ((expected > 0) & (expected < 255)).float().mean() > 0.3, "too saturated to show a difference"
    assert len({image.numpy().tobytes() for image in expected}) == len(INDICES), "two images are the same"
    draws = STEPS if SAMPLERS[sampler].stochastic else 1
    assert sorted(noise) == sorted((i, draw) for i in INDICES for draw in range(draws))
    for micro_batch in (1, 3, 7):
        actual, same_noise = with_recorded_noise(monkeypatch, lambda: images(model, micro_batch=micro_batch, opts=opts))
        assert noise.keys() == same_noise.keys()
        assert all(torch.equal(noise[key], same_noise[key]) for key in noise)
        assert_close_pixels(actual, expected)


def test_images_do_not_depend_on_which_others_are_asked_for(model):
    opts = options(sampler="fixed-small")
    expected = images(model, opts=opts)
    asked = [2**33, 3, 11, 0]
    actual = images(model, torch.tensor(asked), micro_batch=3, opts=opts)
    assert_close_pixels(actual, expected[[INDICES.index(i) for i in asked]])
    assert sum(len(batch.images) for batch in generate(model, PROCESS, opts, [], 3, 4)) == 0


def test_images_depend_on_seed_sampler_and_eta(model):
    runs = [
        images(model),
        images(model, seed=4),
        images(model, seed=3 + 2**32),
        images(model, opts=options(sampler="fixed-small")),
        images(model, opts=options(eta=0.5)),
        images(model, opts=options(skip_steps=STEPS - 1)),
        images(model, opts=options(skip_steps=None)),
        images(model, opts=options(skip_type="quad")),
    ]
    assert len({run.numpy().tobytes() for run in runs}) == len(runs)
    assert torch.equal(images(model), runs[0])


def test_generation_leaves_the_generator_of_torch_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images(model, opts=options(sampler="fixed-large"))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_is_lazy_and_keeps_no_graph(model):
    calls = []
    hook = model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    batches = generate(model, PROCESS, OPTIONS, range(6), 0, 4)
    assert not calls
    next(batches)
    assert calls == [4] * STEPS
    next(batches)
    assert calls == [4] * STEPS + [2] * STEPS
    hook.remove()
    assert torch.is_grad_enabled()
    steps = trajectory(model, PROCESS, OPTIONS, torch.arange(2), 0)
    assert not any(step.x.requires_grad for step in steps)


def test_dropout_acts_in_train_mode_only():
    model = unet(dropout=0.5)
    assert torch.equal(images(model), images(model))
    model.train()
    assert not torch.equal(images(model), images(model))


class Labelled(nn.Module):
    """Predicts the constant image that its label names."""

    in_channels, image_size = 1, 4

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, x, t, label):
        assert t.dtype == torch.int64 and t.shape == label.shape == x.shape[:1]
        self.seen.append(t[0].item())
        return (self.scale * label / 4).view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_conditioning_goes_with_its_image(micro_batch):
    process = GaussianDiffusion(PROCESS.alpha_bar, "pred_x0")
    label = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
    batches = list(generate(Labelled(), process, OPTIONS, range(10, 15), 0, micro_batch, cond={"label": label}))
    expected = to_uint8(label / 4)[:, None, None, None].expand(5, 1, 4, 4)
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_the_network_sees_the_timesteps_of_the_grid():
    model = Labelled()
    list(
        generate(
            model, GaussianDiffusion(PROCESS.alpha_bar, "pred_x0"), OPTIONS, [0], 0, 1, cond={"label": torch.ones(1)}
        )
    )
    assert model.seen == [i * 50 // STEPS for i in reversed(range(STEPS))]


def test_denoiser_clips_and_autocasts(model):
    x = 3 * randn(0, torch.arange(4), 0, (3, 8, 8))
    clipped, free = (denoiser(model, PROCESS, clip)(x, 30) for clip in (True, False))
    assert clipped.x0.abs().max() <= 1 < free.x0.abs().max()
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    half = denoiser(model, PROCESS, False, torch.bfloat16)(x, 30)
    hook.remove()
    assert seen[0].dtype == torch.bfloat16 and half.x0.dtype == torch.float32
    assert torch.equal(half.x0, PROCESS.predict(seen[0].float(), x, 30, False).x0), "the arithmetic is in float32"
    assert 0 < (half.x0 - free.x0).abs().max() < 0.1


# --- frames ---


@pytest.mark.parametrize("n_frames", range(1, STEPS + 1))
@pytest.mark.parametrize("view", ["x", "x0"])
def test_frames(model, view, n_frames):
    opts = options(sampler="fixed-small")
    (batch,) = generate(model, PROCESS, opts, range(3), 0, 8, n_frames=n_frames, view=view)
    assert batch.frames.shape == (3, n_frames, 3, 8, 8) and batch.frames.dtype == torch.uint8
    assert torch.equal(batch.frames[:, -1], batch.images)
    steps = list(trajectory(model, PROCESS, opts, torch.arange(3), 0))
    for frame, i in zip(batch.frames.unbind(1), frame_steps(STEPS, n_frames)):
        assert torch.equal(frame, to_uint8(getattr(steps[i], view)))
    (plain,) = generate(model, PROCESS, opts, range(3), 0, 8)
    assert plain.frames is None and torch.equal(plain.images, batch.images)


def test_the_views_differ_before_the_end(model):
    by_x, by_x0 = (next(generate(model, PROCESS, OPTIONS, range(3), 0, 8, n_frames=STEPS, view=v)) for v in ("x", "x0"))
    assert all(not torch.equal(by_x.frames[:, i], by_x0.frames[:, i]) for i in range(STEPS - 1))


def test_frame_steps():
    assert frame_steps(10, 0) == []
    assert frame_steps(10, 1) == [9]
    assert frame_steps(10, 5) == [1, 3, 5, 7, 9]
    assert frame_steps(7, 7) == list(range(7))
    for steps in range(1, 60):
        for n in range(1, steps + 1):
            kept = frame_steps(steps, n)
            gaps = {b - a for a, b in zip([-1, *kept], kept)}
            assert len(kept) == n and kept[-1] == steps - 1
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1, "not evenly spaced"


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"sampler": "euler"}, {}, ["'euler'", *SAMPLERS]),
        ({"skip_type": "cubic"}, {}, ["'cubic'", "uniform", "quad"]),
        ({"skip_steps": 51}, {}, ["51", "1 to 50"]),
        ({"skip_steps": 0}, {}, ["0", "1 to 50"]),
        ({}, {"n_frames": STEPS + 1}, [str(STEPS + 1), f"{STEPS} sampling steps"]),
        ({"sampler": "fixed-small", "eta": 0.5}, {}, ["eta = 0.5"]),
    ],
)
def test_wrong_options_are_refused(model, changes, more, words):
    with pytest.raises(ValueError) as error:
        list(generate(model, PROCESS, options(**changes), range(2), 0, 2, **more))
    assert all(word in str(error.value) for word in words)


# --- pixels ---


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(levels)
    assert unit.dtype == torch.float32 and unit[0] == -1 and unit[255] == 1
    torch.testing.assert_close(unit.double(), torch.arange(256).double() / 127.5 - 1, rtol=0, atol=1e-7)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(unit.to(dtype)), levels)


def test_to_uint8_rounds_to_the_nearest_level():
    levels = torch.arange(256).double()
    for shift in (-0.49, -0.25, 0.25, 0.49):
        assert torch.equal(to_uint8((levels + shift) / 127.5 - 1), levels.to(torch.uint8))


def test_to_uint8_clamps():
    values = torch.tensor([-torch.inf, -3.0, -1.001, 1.001, 2.0, torch.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 255, 255, 255]
