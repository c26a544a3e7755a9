"""Combinations of settings that can't work are refused by name, and those next to them pass."""

import re

import pytest
from conftest import ROOT
from test_config import assert_tells, one_process  # noqa: F401 (a fixture for every test)

from utils import config, constraints
from utils.errors import InputError

DIGITS = ROOT / "configs" / "ddpm_digits.yaml"


def digits(**overrides):
    """The digits recipe with the schema's diffusion, and overrides given as {section__key: value}."""
    recipe = {name: value for name, value in config.read_yaml(DIGITS).items() if not name.startswith("diffusion.")}
    layer = {name.replace("__", "."): value for name, value in overrides.items()}
    return config.merge(("digits", recipe), ("test", layer))


COMBINATIONS = [  # (overrides of the digits recipe, what the message must say)
    ({"data__image_size": 9}, ["data.image_size = 9", "multiple of 4", "such as 8"]),
    ({"data__image_size": 2}, ["data.image_size = 2", "such as 4"]),
    ({"data__channels": 2}, ["data.channels = 2", "1 (gray) or 3 (RGB)"]),
    ({"model__dim_mults": []}, ["model.dim_mults = []"]),
    ({"model__dim_mults": [1, 0, 2]}, ["model.dim_mults = [1, 0, 2]"]),
    ({"model__attn_resolutions": [16]}, ["model.attn_resolutions = [16]", "16 never occurs", "8, 4, 2"]),
    ({"data__image_size": 32}, ["model.attn_resolutions = [4]", "4 never occurs", "32, 16, 8"]),
    ({"model__norm_groups": 5}, ["model.norm_groups = 5", "32"]),
    ({"model__dim": 36}, ["model.norm_groups = 8", "36"]),
    ({"model__dim": 33, "model__norm_groups": 1}, ["model.dim = 33", "even"]),
    ({"model__n_heads": 3}, ["model.n_heads = 3", "64"]),
    ({"model__n_heads": 3, "model__attn_resolutions": []}, ["model.n_heads = 3", "64"]),  # the middle has attention
    ({"data__captions": "a photo of {}"}, ["data.captions", "model.condition"]),
    ({"sample__skip_steps": 1001}, ["sample.skip_steps = 1001", "1 to 1000"]),
    ({"diffusion__total_steps": 49}, ["sample.skip_steps = 50", "1 to 49"]),
    ({"sample__sampler": "fixed-large", "sample__eta": 0.5}, ["sample.eta = 0.5", "fixed-large", "ddim"]),
    ({"sample__sampler": "unipc", "sample__eta": 0.5}, ["sample.eta = 0.5", "unipc", "ddim"]),
    (
        {"sample__sampler": "learned-range"},
        ["sample.sampler = learned-range", "diffusion.learn_variance = true", "fixed-large", "fixed-small"],
    ),
    ({"sample__guidance_scale": 2}, ["sample.guidance_scale = 2", "model.condition"]),
    ({"diffusion__zero_terminal_snr": True}, ["zero_terminal_snr", "pred_v", "pred_x0"]),
    ({"diffusion__beta_schedule": "jsd"}, ["jsd", "pred_v", "pred_x0"]),
    ({"diffusion__beta_start": 0.5}, ["diffusion.beta_start = 0.5", "diffusion.beta_end = 0.02"]),
    ({"train__betas": [0.9]}, ["train.betas = [0.9]", "two"]),
    ({"train__betas": [-1, 0.5]}, ["train.betas = [-1.0, 0.5]", "[0, 1)"]),
    ({"train__condition_dropout": 0.1}, ["train.condition_dropout", "model.condition"]),
    ({"train__micro_batch": 129}, ["train.micro_batch = 129", "128"]),
]


@pytest.mark.parametrize("overrides, says", COMBINATIONS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_combination_is_refused(overrides: dict, says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        constraints.check(digits(**overrides))
    assert_tells(error, *says)


@pytest.mark.parametrize(
    "overrides",
    [
        {"data__image_size": 12, "model__attn_resolutions": [12, 3]},
        {"model__norm_groups": 32},
        {"model__n_heads": 64},
        {"model__n_heads": 16, "model__attn_resolutions": [8, 4, 2]},
        {"sample__skip_steps": 1000},
        {"sample__skip_steps": None},
        {"sample__sampler": "fixed-large", "sample__eta": 0},
        {"sample__sampler": "ddim", "sample__eta": 1},
        {"sample__sampler": "learned-range", "diffusion__learn_variance": True},
        {"sample__sampler": "fixed-small", "diffusion__learn_variance": True},
        {"sample__sampler": "dpm++2m", "sample__skip_type": "logsnr"},
        {"diffusion__zero_terminal_snr": True, "diffusion__objective": "pred_v"},
        {"diffusion__beta_schedule": "jsd", "diffusion__objective": "pred_x0"},
        {"diffusion__beta_schedule": "cosine", "diffusion__beta_start": 0.5},
        {"train__micro_batch": 128},
        {"train__warmup_steps": 10**6, "train__save_every": 10**6},
    ],
    ids=str,
)
def test_combination_on_the_legal_side_passes(overrides: dict) -> None:
    constraints.check(digits(**overrides))


def test_skip_steps_are_between_1_and_T() -> None:
    for steps in (0, -1, 11):
        with pytest.raises(InputError, match=f"skip_steps = {steps}: wanted 1 to 10"):
            constraints.check_steps(steps, 10)
    for steps in (1, 10, None):
        constraints.check_steps(steps, 10)


@pytest.mark.parametrize("world", [3, 5, 256])
def test_batch_divides_among_the_processes(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(InputError, match=rf"train\.batch_size = 128 .* {world} processes, such as ") as error:
        constraints.check(digits())
    constraints.check(digits(train__batch_size=int(re.search(r"such as (\d+)", str(error.value))[1])))
    constraints.check(digits(), training=False)  # sampling has no batch to divide


def test_micro_batch_may_exceed_the_share_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run of one process can go on with several."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    constraints.check(digits(train__micro_batch=128))
    with pytest.raises(InputError, match=r"train\.micro_batch = 129 .* 128"):
        constraints.check(digits(train__micro_batch=129))
