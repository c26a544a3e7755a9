"""Stopping from outside: signals save and end a run on all processes; one training per run folder."""

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, command, environment, run

from utils import checkpoint
from utils.errors import InputError
from utils.run_folder import open_run
from utils.run_lock import lock
from utils.stopping import StopRule

ENDLESS = [*TINY, "--train.n_steps", 100000, "--train.save_every", 100000, "--train.sample_every", 100000]
ENDLESS += ["--train.valid_every", 100000, "--train.warmup_steps", 0]
ALONE = SimpleNamespace(num_processes=1)


def start(cwd: Path, *args: object, processes: int = 1) -> subprocess.Popen:
    """A training that has made a few steps."""
    process = subprocess.Popen(
        command("train_ddpm.py", "-e", "run", "-r", "auto", *args, processes=processes), cwd=cwd, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines = lambda: (cwd / "run/metrics.jsonl").read_text().count("\n") if (cwd / "run/metrics.jsonl").exists() else 0
    before = lines()
    while process.poll() is None and lines() < before + 3:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    return process


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_saves_and_the_folder_admits_one_training(tmp_path: Path) -> None:
    first = start(tmp_path, *ENDLESS)
    second = run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path, status=2)
    assert f"is being trained by process {first.pid} on" in second.stderr and second.stderr.count("\n") == 1
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    (saved,) = checkpoint.published(tmp_path / "run")
    assert checkpoint.step_of(saved) % 10 == 0 and checkpoint.problem(saved) is None
    assert f"stopped     by SIGTERM at step {checkpoint.step_of(saved)}" in first.stderr.read()
    again = start(tmp_path)  # goes on from there
    again.kill()  # a dead owner holds nothing
    again.wait()
    lock(tmp_path / "run").close()


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    launcher = start(tmp_path, *ENDLESS, processes=2)
    workers = children(launcher.pid)
    rank_1 = next(pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank_1, signal.SIGUSR1)
    launcher.wait(90)
    (saved,) = checkpoint.published(tmp_path / "run")
    assert checkpoint.step_of(saved) % 10 == 0 and checkpoint.problem(saved) is None
    assert "by SIGUSR1 at step" in (tmp_path / "run/train.log").read_text()


def test_a_signal_to_the_whole_group_spares_the_workers_that_read_images(tmp_path: Path) -> None:
    training = start(tmp_path, *ENDLESS, "--data.cache", "false", "--data.num_workers", 1)
    assert children(training.pid)
    os.killpg(training.pid, signal.SIGTERM)
    assert training.wait(60) == 128 + signal.SIGTERM, training.stderr.read()
    (saved,) = checkpoint.published(tmp_path / "run")
    assert checkpoint.step_of(saved) % 10 == 0 and checkpoint.problem(saved) is None


def test_the_second_ctrl_c_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with StopRule(ALONE, SimpleNamespace(max_hours=None, max_bad_steps=1)) as stop:
        assert not stop.wants_stop(10)
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy of the first
        assert not stop.wants_stop(11) and stop.wants_stop(20)
        assert stop.status == 130 and stop.describe() == "SIGINT"
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_killed_before_its_first_file_starts_again(tmp_path: Path) -> None:
    """Found by tests/chaos.py: the folder holds a lock that nobody holds, and half of a configuration."""
    for name in (".lock", ".config.yaml.17.tmp"):
        (tmp_path / name).touch()
    assert open_run(("", {}), [], str(tmp_path), "auto").checkpoint is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is not a run folder"):
        open_run(("", {}), [], str(tmp_path), "auto")


def test_the_time_limit_ends_with_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRule(ALONE, SimpleNamespace(max_hours=0.5, max_bad_steps=1))
    now[0] = 1799.0
    assert not stop.wants_stop(10)
    now[0] = 1801.0
    assert not stop.wants_stop(11) and stop.wants_stop(20)
    assert stop.status == 0 and stop.describe() == "0.5 hours"


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(InputError, match=rf"is being trained by process {os.getpid()} on "):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()
