"""Every recipe of configs/: it is whole, its network has the published size, the docs list it, and it trains."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DModel
from fake_data import FAKES
from in_process import call
from safetensors import safe_open
from test_unet import diffusers_unet

import train_ddpm
from diffusions import build_process
from diffusions.samplers import SAMPLERS
from diffusions.schedules import SKIP_TYPES, time_grid
from models import build_model
from utils import checkpoint, config, constraints
from utils.data import load_splits

RECIPES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}

# Parameters and tensors as published (the checkpoints of Ho et al. 2020 and Song et al. 2021).
CIFAR10_UNET, CELEBA_UNET, UNET_256 = (35_746_307, 328), (78_700_803, 390), (113_673_219, 450)
PUBLISHED = {
    "ddpm_cifar10": CIFAR10_UNET,
    "ddpm_cifar10_v": CIFAR10_UNET,
    "ddpm_celeba": CELEBA_UNET,
    "ddpm_celebahq": UNET_256,
    "ddpm_ffhq": UNET_256,
    "ddpm_lsun_bedroom": UNET_256,
    "ddpm_lsun_cat": UNET_256,
    "ddpm_lsun_church": UNET_256,
}

# Ho et al. 2020, appendix B; Song et al. 2021 and its authors' code; the released flags of Nichol & Dhariwal 2021.
SETTINGS = {  # steps (None: not published), batch, lr, dropout, EMA decay, flips, gradient clipping, T, variance
    "ddpm_cifar10": (800_000, 128, 2e-4, 0.1, 0.9999, True, 1.0, 1000, "fixed-large"),
    "ddpm_celeba": (None, 128, 2e-4, 0.1, 0.9999, True, 1.0, 1000, "fixed-large"),
    "ddpm_celebahq": (500_000, 64, 2e-5, 0.0, 0.9999, True, 1.0, 1000, "fixed-small"),
    "ddpm_lsun_bedroom": (2_400_000, 64, 2e-5, 0.0, 0.9999, False, 1.0, 1000, "fixed-small"),
    "ddpm_lsun_cat": (1_800_000, 64, 2e-5, 0.0, 0.9999, True, 1.0, 1000, "fixed-small"),
    "ddpm_lsun_church": (1_200_000, 64, 2e-5, 0.0, 0.9999, True, 1.0, 1000, "fixed-small"),
    "ddpm_cifar10_improved": (500_000, 128, 1e-4, 0.3, 0.9999, False, None, 4000, "learned-range"),
}

NEEDED = ["data.name", "data.image_size", "data.channels", "model.dim", "model.dim_mults", "model.attn_resolutions"]
NEEDED += ["train.n_steps", "train.batch_size", "train.lr", "train.ema_decay", "sample.sampler", "evaluate.n_samples"]


@pytest.fixture(params=RECIPES)
def recipe(request) -> str:
    return request.param


def merged(name: str, **changes: object):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return config.merge((name, config.read_yaml(RECIPES[name])), ("test", changes))


def network(cfg):
    with torch.device("meta"):
        return build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)


def size(net) -> tuple[int, int]:
    sizes = [parameter.numel() for parameter in net.parameters()]
    return sum(sizes), len(sizes)


def by_diffusers(cfg):
    """The recipe's network in another implementation, from the text of the recipe."""
    patch = 2 if cfg.model.name == "patch_unet" else 1
    model, channels = cfg.model, cfg.data.channels * patch**2
    with torch.device("meta"):
        small = diffusers_unet(
            cfg.data.image_size // patch, model.dim, list(model.dim_mults), list(model.attn_resolutions)
        )
        more = {"in_channels": channels, "out_channels": channels * (2 if cfg.diffusion.learn_variance else 1)}
        more |= {"layers_per_block": model.num_res_blocks, "norm_num_groups": model.norm_groups}
        if model.adaptive_norm:  # where diffusers' attention in the middle is not normalised unless asked
            more |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": model.norm_groups}
        more |= {"attention_head_dim": None if model.n_heads == 1 else model.dim * 2 // model.n_heads}
        known = {key: value for key, value in small.config.items() if not key.startswith("_")}
        return UNet2DModel.from_config(known | more)


def test_a_recipe_is_whole(recipe):
    text = RECIPES[recipe].read_text()
    comment = text[: text.index("\ndata:")].splitlines()
    assert 1 <= len(comment) <= 3 and all(line.startswith("# ") and len(line) <= 140 for line in comment)
    given = config.read_yaml(RECIPES[recipe])
    assert not [key for key in NEEDED if key not in given]
    constraints.check(merged(recipe))


def test_a_network_has_the_published_size(recipe):
    cfg = merged(recipe)
    found = size(network(cfg))
    if cfg.model.condition == "none":
        assert found == size(by_diffusers(cfg))
    assert found == PUBLISHED.get(recipe, found)
    text = RECIPES[recipe].read_text().splitlines()
    told = re.findall(r"([\d.]+) M\s+(?:# )?parameters", " ".join(text[:3]))
    assert not told or f"{found[0] / 1e6:.1f}" in told


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(name):
    cfg = merged(name)
    train = cfg.train
    found = (train.n_steps, train.batch_size, train.lr, cfg.model.dropout, train.ema_decay, cfg.data.random_flip)
    found += (train.clip_grad_norm, cfg.diffusion.total_steps, cfg.sample.sampler)
    assert found[1:] == SETTINGS[name][1:] and SETTINGS[name][0] in (None, train.n_steps)
    assert (cfg.diffusion.objective, cfg.sample.skip_steps) == ("pred_eps", None)
    assert cfg.diffusion.beta_schedule == ("cosine" if "improved" in name else "linear")
    assert (cfg.diffusion.beta_start, cfg.diffusion.beta_end) == (1e-4, 0.02)


def test_a_recipe_ends_in_noise_and_its_sampler_has_a_grid(recipe):
    cfg = merged(recipe)
    process, sample = build_process(cfg.diffusion), cfg.sample
    assert process.alpha_bar[-1] < 1e-4 and process.alpha_bar[0] > 0.999
    assert sample.sampler in SAMPLERS and sample.skip_type in SKIP_TYPES
    S = sample.skip_steps or process.total_steps
    assert len(time_grid(process.alpha_bar, sample.skip_type, S)) == S


def test_the_docs_list_every_recipe_with_its_numbers(recipe):
    cfg = merged(recipe)
    parameters, steps = size(network(cfg))[0], f"{cfg.train.n_steps:,} x {cfg.train.batch_size}"
    rows = (ROOT / "docs/recipes.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith(f"| `{recipe}` |"))  # the first table has the numbers
    assert f"| {steps} |" in row and f"| {parameters:,} |" in row
    assert f"`{recipe}`" in (ROOT / "README.md").read_text()


COMMANDS = re.findall(r"^accelerate launch (.*_ddpm\.py .*)$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)


def test_the_docs_show_every_recipe_trained_and_scored(recipe):
    lines = [line.split() for line in COMMANDS]
    [run] = [line[line.index("-e") + 1] for line in lines if f"configs/{recipe}.yaml" in line]
    assert any("evaluate_ddpm.py" in line and line[line.index("--weights") + 1] == run for line in lines)


# --- tiny data in the real formats ---


def with_data(name: str, root: Path, monkeypatch) -> dict[str, str]:
    """The recipe's data, tiny, below `root`; the keys that point there."""
    cfg = merged(name)
    if cfg.data.name == "digits":
        return {}
    root.mkdir()
    FAKES[cfg.data.name](root, monkeypatch)
    return {"data.root": str(root / "celeba_hq_256.zip" if cfg.data.name == "image_folder" else root)}


def test_a_recipe_reads_the_published_format(tmp_path, monkeypatch, recipe):
    cfg = merged(recipe, data__download=False, **with_data(recipe, tmp_path / "data", monkeypatch))
    splits = load_splits(cfg.data)
    without_test = ("ddpm_celebahq", "ddpm_lsun_cat")
    assert set(splits) == ({"train"} if recipe in without_test else {"train", "test"})
    for images in splits.values():
        image = images[0]
        assert image.dtype == torch.uint8 and image.float().std() > 5
        assert tuple(image.shape) == (cfg.data.channels, cfg.data.image_size, cfg.data.image_size)


SHORT = ["--train.n_steps", 2, "--train.batch_size", 2, "--train.micro_batch", 1, "--train.n_samples", 1]
SHORT += ["--train.n_valid", 1, "--train.log_with", "none", "--train.log_every", 1, "--train.mixed_precision", "no"]
SHORT += ["--train.warmup_steps", 0]  # the first learning rates of a long warm-up are below float32's steps
SHORT += ["--sample.skip_steps", 2, "--sample.mixed_precision", "no", "--data.num_workers", 0]
OTHER_256 = {"ddpm_celebahq", "ddpm_ffhq", "ddpm_lsun_cat", "ddpm_lsun_church"}  # the network of ddpm_lsun_bedroom


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "ddpm_lsun_bedroom" else [])
        for name in RECIPES
        if name not in OTHER_256
    ],
)
def test_two_steps_at_the_full_architecture(tmp_path, monkeypatch, name):
    cfg, keys = merged(name), with_data(name, tmp_path / "data", monkeypatch)
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    call(train_ddpm.main, "-c", RECIPES[name], "-e", "run", *words, *SHORT, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert all(math.isfinite(row["valid_loss_ema"]) for row in rows if "valid_loss" in row)
    assert any("valid_loss" in row for row in rows)
    assert (tmp_path / "run/samples/step000002.png").stat().st_size > 0
    [last] = checkpoint.published(tmp_path / "run")
    raw, ema = (safe_open(last / f"{kind}.safetensors", "pt") for kind in ("model", "ema"))
    counts = [math.prod(raw.get_slice(key).get_shape()) for key in raw.keys()]  # noqa: SIM118 (no mapping)
    assert (sum(counts), len(counts)) == size(network(cfg))
    moved = [key for key in raw.keys() if not torch.equal(raw.get_tensor(key), ema.get_tensor(key))]  # noqa: SIM118
    moved = [key for key in moved if raw.get_tensor(key).isfinite().all()]
    assert len(moved) == len(counts)  # the average is made of other weights than the last ones: both updates took place
    shutil.rmtree(tmp_path / "run")  # up to two gigabytes
