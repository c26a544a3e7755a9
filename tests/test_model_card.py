"""The card of an export says what is known of the weights, and claims nothing else."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from in_process import KEYS, call, random_weights
from safetensors import safe_open
from tiny_run import tiny_run

import convert_ddpm
import evaluate_ddpm
import sample_ddpm
import train_ddpm
from utils import checkpoint, config
from utils.images import write_png

FORMATS = convert_ddpm.FORMATS
SCORE = ["--reference", "digits:test", "--metrics", "bpd", "--n_samples", 4]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six updates of sixteen images, a preview, a score."""
    keys = {**KEYS, "sample.skip_steps": 2, "train.batch_size": 16, "train.n_steps": 8, "train.lr": 0.003}
    folder = tiny_run(tmp_path / "run", config.merge(("test", keys)), (4, 6))
    (folder / "samples").mkdir()
    for step in (4, 6):
        write_png(folder / f"samples/step{step:06d}.png", torch.full((1, 8, 8), step, dtype=torch.uint8))
    return folder


def card(weights: Path, to: str, *args: object) -> str:
    place = weights.parent if weights.is_dir() else weights.parent.parent
    call(convert_ddpm.main, "--weights", weights, "--to", to, "--out", f"out-{to}", *args, cwd=place)
    return (place / f"out-{to}/README.md").read_text()


@pytest.mark.parametrize("to", FORMATS)
def test_every_export_has_a_card_of_its_run(run: Path, to: str) -> None:
    if to == "ddim":  # which knows no cosine betas, and predicts the noise
        run = tiny_run(run.parent / "linear", _ddim_config(), (6,))
        (run / "samples").mkdir()
        write_png(run / "samples/step000006.png", torch.full((1, 8, 8), 6, dtype=torch.uint8))
    text = card(run, to)
    with safe_open(run / "ckpt/step000006/ema.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert f"{parameters:,} parameters" in text and "6 updates, 96 images" in text and "`digits`, 90.0% of" in text
    assert "8 updates of 16 images" in text and "learning rate 0.003 (constant)" in text and "float32" in text
    assert "![samples](samples.png)" in text and "## Scores" not in text
    assert (run.parent / f"out-{to}/samples.png").read_bytes() == (run / "samples/step000006.png").read_bytes()
    assert "states no licence" in text and "\nlicense:" not in text and str(run.parent) not in text
    assert text.startswith("---\nlibrary_name: diffusers\n") == (to == "diffusers")
    assert ("from diffusers import" in text) == (to == "diffusers")


def _ddim_config():
    keys = {**KEYS, "model.norm_groups": 32, "model.dim": 32, "diffusion.beta_schedule": "linear"}
    keys |= {"diffusion.objective": "pred_eps", "diffusion.beta_end": 0.5, "diffusion.total_steps": 20}
    keys |= {"train.batch_size": 16, "train.n_steps": 8, "train.lr": 0.003, "sample.skip_steps": 2}
    return config.merge(("test", keys))


@pytest.mark.parametrize("to", FORMATS)
def test_the_commands_of_a_card_work(run: Path, to: str) -> None:
    if to == "ddim":
        run = tiny_run(run.parent / "linear", _ddim_config(), (6,))
    text = card(run, to)
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("accelerate launch")]
    assert len(lines) == 1 + (to == "native")
    scripts = {"sample_ddpm.py": sample_ddpm.main, "train_ddpm.py": train_ddpm.main}
    for _, _, script, *words in lines:
        out = str(run.parent / f"out-{to}")
        words = ["2" if word == "64" else word.replace("PATH", out) for word in words]
        more = ["--skip_steps", 2] if script == "sample_ddpm.py" else ["--print_config"]
        call(scripts[script], *words, *more, cwd=run.parent)


def test_scores_are_those_of_these_weights(run: Path) -> None:
    for folder in (run, run / "ckpt/step000004"):
        call(evaluate_ddpm.main, "--weights", folder, *SCORE, "--data.valid_fraction", 0.1, cwd=run.parent)
    path = run / "scores/step000006/results.json"
    [row] = json.loads(path.read_text())["rows"]
    text = card(run, "safetensors")
    assert f"{row['scores']['bpd']:.4g}" in text and row["protocol"]["reference_sha256"][:12] in text
    assert "step000004" not in text and "4 images in" in text
    raw = ["--load_ema", "false"]
    (run.parent / "out-safetensors").rename(run.parent / "before")
    text = card(run, "safetensors", *raw)
    assert "## Scores" not in text and "samples.png" not in text  # both are of the moving average
    assert "weights without averaging" in text


def test_nothing_is_claimed_of_other_projects_weights(tmp_path: Path) -> None:
    file = random_weights(tmp_path / "ours")
    card(file, "diffusers")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out-diffusers").rename(tmp_path / "theirs/model")
    text = card(tmp_path / "theirs/model", "native", "--data.name", "digits")
    assert "another project's" in text and "Trained on" not in text and "learning rate" not in text
    again = card(tmp_path / "theirs/out-native", "safetensors")
    assert re.search(r"Converted from diffusion\\_pytorch\\_model.safetensors \(SHA-256 \w{64}", again)
    assert "learning rate" not in again


def test_what_users_named_is_no_markup(tmp_path: Path) -> None:
    keys = {**KEYS, "model.condition": "class", "model.classes": ["<img src=x>", "a|b\n# c", "*d*"]}
    run = tiny_run(tmp_path / "run", config.merge(("test", keys)))
    text = card(run, "safetensors")
    row = next(line for line in text.splitlines() if line.startswith("| classes"))
    assert "&lt;img src=x&gt;, a\\|b # c, \\*d\\*" in row and "<img" not in text
    assert "class-conditional" in text and "--labels all" in text and checkpoint.published(run)
