"""A disk that takes no more: the checkpoints that are there stay good, and the run says so and goes on, or stops."""

import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from chaos import same_checkpoint
from conftest import TINY, command, environment, run

from utils import checkpoint
from utils.errors import SaveFailed

ARGS = [*TINY, "--train.n_steps", 60, "--train.save_every", 5, "--train.keep_last", "null", "--train.valid_every", 30]


def train_until_full(cwd: Path, *args: object) -> subprocess.Popen:
    """A training whose files may not grow any more once its first checkpoint is there."""
    process = subprocess.Popen(
        command("train_ddpm.py", "-e", "run", *ARGS, *args), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (cwd / "run/ckpt/step000005").exists():
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200, 200))
    return process


@pytest.mark.parametrize("policy", ["go_on", "stop"])
def test_a_full_disk_costs_no_checkpoint(tmp_path: Path, policy: str) -> None:
    process = train_until_full(tmp_path, "--train.save_failure", policy)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said, said[-3000:]
    assert said.strip().splitlines()[-1].startswith("train_ddpm.py: stopped: the checkpoint of step")
    assert "metrics.jsonl can't be written: File too large; training goes on" in said
    failures = said.count("not saved   the checkpoint of step")
    assert failures == 1 if policy == "stop" else failures > 1
    found = checkpoint.published(tmp_path / "run")
    assert found and all(checkpoint.problem(folder) is None for folder in found)
    assert not list((tmp_path / "run/ckpt").glob(".staging-*"))
    if policy == "go_on":  # with room again, the run ends as if nothing had happened
        run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path)
        run("train_ddpm.py", "-e", "whole", *ARGS, cwd=tmp_path)
        same_checkpoint(tmp_path / "whole/ckpt/step000060", tmp_path / "run/ckpt/step000060")


def test_a_folder_removed_under_the_run_ends_it_in_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("train_ddpm.py", "-e", "run", *ARGS, "--train.n_steps", 100000), cwd=tmp_path, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "run/ckpt/step000005").exists():
        time.sleep(0.01)
    (tmp_path / "run").rename(tmp_path / "away")
    time.sleep(2)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode in (1, 143) and "Traceback" not in said, said[-3000:]
    good, bad = checkpoint.newest(tmp_path / "away", print)
    assert good is not None and not bad


def test_nothing_is_left_of_a_checkpoint_that_failed(tmp_path: Path, trained: Path, monkeypatch) -> None:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(SaveFailed, match="step 99 could not be written: No space left on device"):
        checkpoint.publish(tmp_path / "run/ckpt", 99, "", {}, {}, {}, {})
    names = {path.name for path in (tmp_path / "run/ckpt").iterdir()}
    assert names == {"step000006", "step000012"}
