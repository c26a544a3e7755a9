"""train_ddpm.py from the command line: what it writes, resuming, several processes, gradients gone bad."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, environment, run
from safetensors.torch import load_file

from utils import checkpoint
from utils.state import read_state


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def assert_same_checkpoint(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (one, other))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in ("exp_avg", "exp_avg_sq", "step"))
    assert read_state(one)["ema"] == read_state(other)["ema"]


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


def test_sigkill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    """Dropout, bf16, an uneven last micro-batch, three epoch boundaries, checkpoints off the log grid."""
    args = [*TINY, "--model.dropout", 0.1, "--train.micro_batch", 5, "--train.n_steps", 40, "--train.save_every", 5]
    args += ["--train.mixed_precision", "bf16", "--train.log_every", 3, "--train.valid_every", 10]
    run("train_ddpm.py", "-e", "whole", *args, cwd=tmp_path)
    kills = 0
    for wanted in (10, 25):
        process = subprocess.Popen(
            command("train_ddpm.py", "-e", "killed", "-r", "auto", *args), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (tmp_path / f"killed/ckpt/step{wanted:06d}").exists():
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert not (tmp_path / "killed/ckpt/step000040").exists()
    run("train_ddpm.py", "-e", "killed", "-r", "auto", *args, cwd=tmp_path)
    assert_same_checkpoint(tmp_path / "whole/ckpt/step000040", tmp_path / "killed/ckpt/step000040")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_resume_by_path_sets_newer_checkpoints_aside(tmp_path: Path, trained: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    run("train_ddpm.py", "-r", "run/ckpt/step000006", cwd=tmp_path)
    assert_same_checkpoint(trained / "ckpt/step000012", tmp_path / "run/ckpt/step000012")
    assert (tmp_path / "run/ckpt/step000012.superseded").is_dir()
    assert metrics(tmp_path / "run") == metrics(trained)


def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, trained: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    file = tmp_path / "run/ckpt/step000012/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path)
    assert "skipping checkpoint step000012: model.safetensors is damaged" in done.stderr
    assert (tmp_path / "run/ckpt/step000012.bad").is_dir()
    assert_same_checkpoint(trained / "ckpt/step000012", tmp_path / "run/ckpt/step000012")


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


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """fp32 without dropout: the same global batches, timesteps and noise, so the same first 20 losses to 1e-5."""
    args = [*TINY, "--train.n_steps", 20, "--train.mixed_precision", "no", "--train.micro_batch", 3]
    args += ["--train.save_every", 10, "--data.random_flip", "true"]
    run("train_ddpm.py", "-e", "one", *args, cwd=tmp_path)
    run("train_ddpm.py", "-e", "two", *args, cwd=tmp_path, processes=2)
    one, two = ([row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert one == pytest.approx(two, abs=1e-5)
    assert [r["lr"] for r in metrics(tmp_path / "one") if "lr" in r] == [
        r["lr"] for r in metrics(tmp_path / "two") if "lr" in r
    ]
    # A checkpoint of two processes goes on with one.
    run("train_ddpm.py", "-e", "two", "-r", "auto", "--train.n_steps", 22, cwd=tmp_path)
    assert [row["step"] for row in metrics(tmp_path / "two") if "loss" in row] == list(range(1, 23))


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
