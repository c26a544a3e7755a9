"""Where a run lives, and how one is resumed: the stored configuration is the base, and little of it may change."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from utils.checkpoint import (
    clear_staging,
    is_checkpoint_name,
    newest,
    problem,
    prune,
    published,
    quarantine,
    step_of,
    write_atomically,
)
from utils.cli import say
from utils.config import differences, merge, read_yaml, to_yaml
from utils.constraints import MAY_CHANGE, has_moved
from utils.distributed import from_main
from utils.errors import InputError
from utils.run_lock import lock
from utils.state import read_state


@dataclass
class Run:
    """A run folder, its configuration, and the checkpoint to go on from (None: start at step 0)."""

    folder: Path
    config: DictConfig
    checkpoint: Path | None = None
    aside: dict[Path, str] = field(default_factory=dict)  # checkpoints to rename before training: folder -> suffix
    lock: IO[str] | None = None  # held while this process trains

    def stored_state(self) -> dict[str, Any]:
        """state.json of the checkpoint; empty for a run that starts from nothing."""
        return read_state(self.checkpoint) if self.checkpoint else {}


Layer = tuple[str, dict[str, Any]]


def open_run(default: Layer, asked: list[Layer], folder: str | None, resume: str | None) -> Run:
    """Decide where to train and from what. Reads only: every process of a launch comes to the same answer.

    Args:
        default: the configuration of a new run for which nothing else was asked.
        asked: layers of (where they came from, {key: value}): the YAML file if one was given, then the overrides.
        folder: -e, or None for runs/exp-{time}.
        resume: -r: None, "auto" or a path of a run folder or checkpoint folder.

    Raises:
        InputError: the folder holds another run, nothing to resume from, or a key that may not change.
    """
    if resume is None:
        path = Path(folder) if folder else _default_folder()
        if path.exists() and not path.is_dir():
            raise InputError(f"run folder {path} is a file")
        if path.exists() and any(path.iterdir()):
            raise InputError(
                f"{path} already holds a run or other files: continue it with -r auto, or choose another -e"
            )
        return Run(path, merge(default, *asked))
    if resume == "auto" and folder is None:
        raise InputError("-r auto needs the run folder: -e RUN -r auto (or -r RUN)")
    path, checkpoint, bad = _find(Path(folder if resume == "auto" else resume), resume == "auto")
    if folder and resume != "auto" and Path(folder).resolve() != path.resolve():
        raise InputError(f"-r {resume} continues in its own run folder {path}, but -e says {folder}")
    aside = dict.fromkeys(bad, "bad")
    if checkpoint is None:
        stored = path / "config.yaml"  # of a run that was stopped before its first checkpoint
        return Run(
            path, merge(default if not stored.exists() else (str(stored), read_yaml(stored)), *asked), None, aside
        )
    stored = merge((str(checkpoint / "config.yaml"), read_yaml(checkpoint / "config.yaml")))
    config = merge(*asked, base=stored)
    for name, (old, new) in differences(stored, config).items():
        if name not in MAY_CHANGE and not has_moved(name, old, new):
            raise InputError(f"{name} = {new} can't change when a run is resumed; it was started with {old}")
    newer = [other for other in published(path) if step_of(other) > step_of(checkpoint) and other not in aside]
    return Run(path, config, checkpoint, aside | dict.fromkeys(newer, "superseded"))


def _default_folder() -> Path:
    return Path("runs") / time.strftime("exp-%Y-%m-%d-%H%M%S")


def _find(path: Path, auto: bool) -> tuple[Path, Path | None, list[Path]]:
    """(run folder, checkpoint or None, checkpoints that fail verification) for -r."""
    if not auto and not path.is_dir():
        raise InputError(f"-r {path}: no such run or checkpoint folder")
    if not auto and is_checkpoint_name(path):
        why = problem(path)
        if why:
            raise InputError(f"-r {path}: not a good checkpoint: {why}")
        return path.resolve().parent.parent, path.resolve(), []
    if path.exists() and not path.is_dir():
        raise InputError(f"run folder {path} is a file")
    found = [file.name for file in path.iterdir()] if path.exists() else []
    begun = all(name.startswith(".") for name in found)  # empty, or killed before its config.yaml was there
    if not (begun or (path / "ckpt").is_dir() or (path / "config.yaml").is_file()):
        raise InputError(f"{path} is not a run folder: it holds other files and neither config.yaml nor ckpt/")
    good, bad = newest(path, say)
    if good is None and not auto:
        raise InputError(f"-r {path}: no good checkpoint in it")
    return path, good, bad


def claim(run: Run, accelerator) -> None:
    """Make the run folder, set doubtful checkpoints aside, and store the configuration. A collective.

    All processes looked at the folder before this; the main one changes it now, and its choice of folder holds for all.
    """
    run.folder = from_main(accelerator, run.folder)
    accelerator.wait_for_everyone()
    why = None
    if accelerator.is_main_process:
        try:
            _claim(run)
        except InputError as error:
            why = str(error)
        except OSError as error:
            why = f"run folder {run.folder} can't be written: {error.strerror}"
    why = from_main(accelerator, why)  # no process goes on alone
    if why:
        raise InputError(why)


def _claim(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = lock(run.folder)
    found = [step_of(path) for path in published(run.folder) if path not in run.aside]
    if max(found, default=-1) > (step_of(run.checkpoint) if run.checkpoint else -1):
        raise InputError(f"{run.folder} was trained further meanwhile: start again with -r auto")
    for folder, suffix in run.aside.items():
        say(f"{folder.name} is now {quarantine(folder, suffix).name}")
    clear_staging(run.folder / "ckpt")  # also where nothing is left to train and so nothing to save
    prune(run.folder, run.config.train.keep_last)
    for leftover in (*run.folder.glob(".*.tmp"), *run.folder.glob("samples/.*.tmp")):  # of a killed process
        leftover.unlink()
    write_atomically(run.folder / "config.yaml", lambda path: path.write_text(to_yaml(run.config)))
