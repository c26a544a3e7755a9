"""SIGKILL at every moment of writing: the quick version of tests/chaos.py, in forks that need no start-up."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from chaos import SAMPLE, TRAIN, images, same_images, same_run
from in_process import forked, random_weights
from kill_at import Death, arm
from test_checkpoint import save

import sample_ddpm
import train_ddpm
from utils import checkpoint

WRITTEN = ("config.yaml", "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json")


def in_a_fork(death: Death, run: Path, step: int) -> int:
    """Publish a checkpoint, keep two, in another process; returns how that ended. Its moments go to run/met."""
    pid = os.fork()
    if not pid:
        arm(death)
        save(run, step, 1.0)
        checkpoint.prune(run, 2)
        (run / "met").write_bytes(json.dumps(list(death.met)).encode())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def steps(run: Path) -> list[int]:
    """Of the published checkpoints, all of which must be good."""
    assert not any(map(checkpoint.problem, checkpoint.published(run)))
    return [checkpoint.step_of(path) for path in checkpoint.published(run)]


def test_a_kill_at_any_moment_of_a_save_costs_at_most_that_save(tmp_path: Path) -> None:
    for run in ("good", "listing"):
        save(tmp_path / run, 1, 1.0)
        save(tmp_path / run, 2, 1.0)
    assert in_a_fork(Death(None), tmp_path / "listing", 3) == 0
    met = json.loads((tmp_path / "listing/met").read_text())
    assert {f"half {name}" for name in WRITTEN} | {f"before fsync {name}" for name in WRITTEN} < set(met)
    assert {"before rename staging", "before fsync ckpt", "before rename old checkpoint", "half doomed"} < set(met)
    assert 30 < len(met) < 60
    published = met.index("before rename staging")
    for i, moment in enumerate(met):
        run = shutil.copytree(tmp_path / "good", tmp_path / str(i))
        assert in_a_fork(Death(moment), run, 3) == -signal.SIGKILL, moment
        assert steps(run)[-2:] == ([1, 2] if i <= published else [2, 3]), moment
        assert in_a_fork(Death(None), run, 4) == 0
        assert steps(run) == ([2, 4] if i <= published else [3, 4]), moment
        assert not list((run / "ckpt").glob(".*")), moment  # what it had begun is gone


MOMENTS = [
    *("half model.safetensors", "half metrics.jsonl", "before rename staging", "before fsync ckpt", "half doomed"),
    *("half optimizer.pt", "before replace new metrics.jsonl", "half manifest.json"),
]


def test_a_training_that_is_killed_again_and_again_ends_bit_identical(tmp_path: Path) -> None:
    """Dropout, bf16, an uneven last micro-batch, two epoch boundaries."""
    args = [*TRAIN, "--train.n_steps", 40, "--train.log_with", "none"]
    forked(train_ddpm.main, "-e", "whole", *args, cwd=tmp_path)
    for n, moment in enumerate(MOMENTS):
        forked(
            train_ddpm.main, "-e", "killed", "-r", "auto", *args, cwd=tmp_path, status=-signal.SIGKILL,
            prepare=lambda: arm(Death(moment, 1 if moment.startswith("before replace") else 1 + n % 2)),
        )  # fmt: skip
    assert not (tmp_path / "killed/ckpt/step000040").exists()
    forked(train_ddpm.main, "-e", "killed", "-r", "auto", *args, cwd=tmp_path)
    same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("moment", ["half doomed", "before rename old checkpoint"])
def test_a_kill_after_the_last_save_leaves_nothing_behind(tmp_path: Path, moment: str) -> None:
    """Found by tests/chaos.py: the next start had nothing to train, so nothing was tidied."""
    args = [*TRAIN, "--train.n_steps", 15, "--train.log_with", "none"]
    forked(train_ddpm.main, "-e", "whole", *args, cwd=tmp_path)
    forked(
        train_ddpm.main, "-e", "killed", *args, cwd=tmp_path, status=-signal.SIGKILL,
        prepare=lambda: arm(Death(moment)),
    )  # fmt: skip
    assert checkpoint.newest(tmp_path / "killed", print)[0].name == "step000015"
    forked(train_ddpm.main, "-e", "killed", "-r", "auto", *args, cwd=tmp_path)
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "killed/curves.png").exists()


@pytest.mark.parametrize("moment", ["half new protocol.json", "half new image", "before replace new image"])
def test_a_generation_that_is_killed_goes_on_where_it_stopped(tmp_path: Path, moment: str) -> None:
    args = ["--weights", random_weights(tmp_path / "net"), *SAMPLE, "--n_samples", 48, "--skip_steps", 12]
    forked(sample_ddpm.main, *args, "--save_dir", "whole/images", cwd=tmp_path)
    death = Death(moment, 1 if "protocol" in moment else 20)
    killed = [*args, "--save_dir", "killed/images"]
    forked(sample_ddpm.main, *killed, cwd=tmp_path, status=-signal.SIGKILL, prepare=lambda: arm(death))
    n_done = len(images(tmp_path / "killed"))
    assert n_done == 0 if "protocol" in moment else 17 <= n_done <= 19  # two threads write
    forked(sample_ddpm.main, *killed, cwd=tmp_path)
    same_images(tmp_path / "whole", tmp_path / "killed")
