"""train_ddpm.py from the command line: what it writes, resuming, several processes, gradients gone bad."""

import subprocess
from pathlib import Path

import pytest
import torch
from chaos import metrics, same_checkpoint
from conftest import ROOT, TINY, command, environment, run
from safetensors.torch import load_file

from utils import checkpoint


def test_files_of_a_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.yaml", "train.log", "metrics.jsonl", "curves.png", "tensorboard", "samples", "ckpt"}
    assert [path.name for path in checkpoint.published(trained)] == ["step000006", "step000012"]
    assert all(checkpoint.problem(path) is None for path in checkpoint.published(trained))
    assert {path.name for path in (trained / "ckpt/step000012").iterdir()} == {
        *("config.yaml", "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json")
    }
    assert (trained / "samples/step000012.png").stat().st_size > 0
    rows = metrics(trained)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "valid_loss_ema" in row] == [12]
    assert all(row["lr"] > 0 for row in rows if "lr" in row) and rows[0]["lr"] < rows[2]["lr"]


def test_weights_have_plain_fp32_keys(trained: Path) -> None:
    weights = load_file(trained / "ckpt/step000012/model.safetensors")
    assert "down.0.block.0.conv1.weight" in weights
    assert all(value.dtype == torch.float32 for value in weights.values())
    ema = load_file(trained / "ckpt/step000012/ema.safetensors")
    assert ema.keys() == weights.keys() and any(not torch.equal(ema[k], weights[k]) for k in ema)


def test_tensorboard_holds_the_losses(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx({row["step"]: row["loss"] for row in metrics(trained) if "loss" in row}, rel=1e-5)
    assert [event.step for event in events.Images("samples")] == [12]


def test_resume_by_path_sets_newer_checkpoints_aside(tmp_path: Path, trained: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    run("train_ddpm.py", "-r", "run/ckpt/step000006", cwd=tmp_path)
    same_checkpoint(trained / "ckpt/step000012", tmp_path / "run/ckpt/step000012")
    assert (tmp_path / "run/ckpt/step000012.superseded").is_dir()
    assert metrics(tmp_path / "run") == metrics(trained)


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, trained: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    file = tmp_path / "run/ckpt/step000012/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path)
    assert "skipping checkpoint step000012: model.safetensors is damaged" in done.stderr
    assert (tmp_path / "run/ckpt/step000012.bad").is_dir()
    same_checkpoint(trained / "ckpt/step000012", tmp_path / "run/ckpt/step000012")


def test_finished_run_says_so_and_may_be_extended(tmp_path: Path, trained: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    assert "nothing to do" in run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path).stderr
    run("train_ddpm.py", "-e", "run", "-r", "auto", "--train.n_steps", 14, "--train.keep_last", 1, cwd=tmp_path)
    assert [path.name for path in checkpoint.published(tmp_path / "run")] == ["step000014"]
    done = run("train_ddpm.py", "-e", "run", "-r", "auto", "--train.lr", "1e-3", cwd=tmp_path, status=2)
    assert "train.lr" in done.stderr and "can't change" in done.stderr


def test_an_existing_run_is_not_overwritten(tmp_path: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    done = run("train_ddpm.py", "-e", trained, *TINY, cwd=tmp_path, status=2)
    assert "already holds a run" in done.stderr and "-r auto" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_non_finite_gradients_stop_the_run_and_spare_the_weights(tmp_path: Path) -> None:
    args = [
        *TINY,
        "--train.n_steps",
        40,
        "--train.max_bad_steps",
        3,
        "--train.save_every",
        1,
        "--train.warmup_steps",
        0,
    ]
    done = run("train_ddpm.py", "-e", "run", *args, "--train.lr", "1e30", cwd=tmp_path, status=1)
    assert "non-finite gradient" in done.stderr and "Traceback" not in done.stderr
    for folder in checkpoint.published(tmp_path / "run"):
        assert checkpoint.problem(folder) is None
        assert all(torch.isfinite(value).all() for value in load_file(folder / "model.safetensors").values())


def test_wall_time_limit_saves_and_goes_on(tmp_path: Path) -> None:
    args = ["-e", "run", *TINY, "--train.n_steps", 30, "--train.save_every", 1000]
    done = run("train_ddpm.py", *args, "--train.max_hours", "1e-9", cwd=tmp_path)
    assert "stopped" in done.stderr
    assert [path.name for path in checkpoint.published(tmp_path / "run")] == ["step000010"]
    run("train_ddpm.py", *args, "-r", "auto", "--train.max_hours", "null", cwd=tmp_path)
    assert [path.name for path in checkpoint.published(tmp_path / "run")][-1] == "step000030"


def test_the_first_step_waits_for_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    args = command("train_ddpm.py", "-e", tmp_path / "run", *TINY, "--train.n_steps", 2)
    env = environment() | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    before, bar, _ = done.stderr.partition("train: ")
    imported = {line.rpartition("|")[2].strip() for line in before.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and bar and "torch" in imported
    assert not imported & {"torchvision", "torch_fidelity", "sklearn", "matplotlib"}


def test_a_warm_up_longer_than_the_training_is_told(tmp_path: Path) -> None:
    args = ["-e", "run", *TINY, "--train.n_steps", 2]
    done = run("train_ddpm.py", *args, "--train.warmup_steps", 500, cwd=tmp_path)
    assert "warning: train.warmup_steps = 500 is longer than the training" in done.stderr
    assert "longer than the training" not in run("train_ddpm.py", "-e", "other", *args[2:], cwd=tmp_path).stderr


def test_default_run_without_arguments_uses_the_digits(tmp_path: Path) -> None:
    done = run("train_ddpm.py", "--print_config", cwd=tmp_path)
    assert "name: digits" in done.stdout and not list(tmp_path.iterdir())


def test_no_trainer_hides_the_gradient_step() -> None:
    text = (ROOT / "train_ddpm.py").read_text()
    for line in ("process.loss(", "accelerator.backward(", "clip_grad_norm_(", "optimizer.step()", "ema.update()"):
        assert line in text
    assert all(
        len((ROOT / f"{name}_ddpm.py").read_text().splitlines()) <= 170 for name in ("train", "sample", "evaluate")
    )
