"""train.evaluate_every: a score on the way, on any number of processes, and ckpt/best, which is never pruned."""

import json
import shutil
from pathlib import Path

import pytest
from chaos import metrics, same_checkpoint
from conftest import TINY
from in_process import forked

import sample_ddpm
import train_ddpm
from utils import checkpoint

NAME = "fid[dataset-classifier]@80"
ARGS = [*TINY, "--train.n_steps", 16, "--train.save_every", 100, "--train.sample_every", 100, "--train.keep_last", 1]
ARGS += ["--train.evaluate_every", 4, "--train.n_evaluate", 80, "--train.log_with", "none", "--evaluate.cache_dir"]
ARGS += ["../cache", "--train.lr", "0.05", "--train.ema_decay", "0.5", "--data.valid_fraction", "0.2"]
ARGS += ["--train.lr_schedule", "constant", "--model.dropout", 0, "--train.mixed_precision", "no"]


def scores(run: Path) -> dict[int, float]:
    return {row["step"]: row[NAME] for row in metrics(run) if NAME in row}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    forked(train_ddpm.main, "-e", "run", *ARGS, cwd=folder)
    return folder / "run"


def test_the_best_checkpoint_is_kept_and_pointed_to(scored: Path, tmp_path: Path) -> None:
    found = scores(scored)
    assert list(found) == [4, 8, 12, 16]
    best = min(found, key=found.get)
    kept = {checkpoint.step_of(path) for path in checkpoint.published(scored)}
    assert kept == {best, 16} and (scored / "ckpt/best").resolve().name == checkpoint.folder_name(best)
    state = json.loads((scored / "ckpt/step000016/state.json").read_text())
    assert state["best"] == {"step": best, "score": found[best]}
    args = ["--weights", scored / "ckpt/best", "--n_samples", 1, "--save_dir", "out"]
    forked(sample_ddpm.main, *args, cwd=tmp_path)
    assert (tmp_path / "out/000000.png").exists()
    assert checkpoint.verify(["verify", str(scored)]) == 0


def test_two_processes_come_to_the_same_scores(scored: Path) -> None:
    forked(train_ddpm.main, "-e", "two", *ARGS, cwd=scored.parent, processes=2)
    assert scores(scored.parent / "two") == pytest.approx(scores(scored), rel=0.02)


def test_a_resumed_run_knows_its_best(scored: Path, tmp_path: Path) -> None:
    """Stopped after the best and resumed, it ends as the run that was left alone."""
    folder = scored.parent
    forked(train_ddpm.main, "-e", "cut", *ARGS, "--train.n_steps", 12, cwd=folder)
    cut = scores(folder / "cut")
    assert cut == {step: value for step, value in scores(scored).items() if step <= 12}
    shutil.move(folder / "cut/ckpt/best", tmp_path / "best")  # as if killed between a save and the link
    forked(train_ddpm.main, "-e", "cut", "-r", "auto", "--train.n_steps", 16, cwd=folder)
    assert scores(folder / "cut") == scores(scored)
    assert (folder / "cut/ckpt/best").resolve().name == (scored / "ckpt/best").resolve().name
    same_checkpoint(folder / "cut/ckpt/step000016", scored / "ckpt/step000016")
