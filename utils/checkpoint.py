"""Checkpoints that are either whole or not there.

A checkpoint is staged beside its place, every file fsynced, a manifest of SHA-256 sums written last, and published by
one rename. A folder without a good manifest does not exist for `newest`; one that fails verification is renamed
`*.bad`. Weights are safetensors, the rest loads with weights_only: no pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.pretrained import differences
from utils.errors import InputError, SaveFailed, TrainingDiverged, run_script

MANIFEST = "manifest.json"
CONFIG, KIND = "config", "weights"  # in the header of a safetensors file that stands alone: YAML, and EMA, raw or only
NAME = re.compile(r"step(\d{6,})$")


def folder_name(step: int) -> str:
    return f"step{step:06d}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary path)`, then put the file in place of `path` by one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def publish(
    ckpt_dir: Path,
    step: int,
    config_yaml: str,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Write `ckpt_dir/stepNNNNNN` whole or not at all, and return it; one that is already there and good is kept.

    Raises:
        TrainingDiverged: a weight is not finite.
        SaveFailed: a full disk, a quota, a folder that is gone; nothing is left behind.
    """
    for kind, weights in (("model", model), ("EMA", ema)):
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise TrainingDiverged(f"the {kind} weights of step {step:,} are not finite ({broken[0]}): not published")
    target, staging = ckpt_dir / folder_name(step), None
    try:
        if target.exists():
            if not problem(target):
                return target
            quarantine(target, "bad")
        ckpt_dir.mkdir(parents=True, exist_ok=True)
        clear_staging(ckpt_dir)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=ckpt_dir))
        (staging / "config.yaml").write_text(config_yaml)
        for name, kind, weights in (("model", "raw", model), ("ema", "EMA", ema)):
            header = {"format": "pt", CONFIG: config_yaml, KIND: kind}  # each file can be taken away and used alone
            save_file(_plain(weights), staging / f"{name}.safetensors", header)
        torch.save(optimizer, staging / "optimizer.pt")
        (staging / "state.json").write_text(json.dumps(state, indent=1))
        files = sorted(staging.iterdir())
        for path in files:
            _fsync(path)
        manifest = {"step": step, "sha256": {path.name: sha256(path) for path in files}}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _fsync(staging / MANIFEST)
        _fsync(staging)
        os.chmod(staging, 0o755)
        os.rename(staging, target)
        _fsync(ckpt_dir)
    except (OSError, SafetensorError, RuntimeError) as error:  # the latter two are how writers name a full disk
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise SaveFailed(f"the checkpoint of step {step:,} could not be written: {why}") from error
    return target


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32, contiguous, on the CPU."""
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}


def problem(folder: Path) -> str | None:
    """Why a checkpoint folder can't be trusted; None where every file matches its SHA-256 sum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sums, step = dict(manifest["sha256"]), manifest["step"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is damaged"
    for name in ("config.yaml", "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"):
        if name not in sums:
            return f"{MANIFEST} does not list {name}"
    if is_checkpoint_name(folder) and step != step_of(folder):
        return f"{MANIFEST} is that of step {step}"
    for name, expected in sums.items():
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != expected:
                return f"{name} is damaged: its SHA-256 differs from the manifest's"
        except (OSError, ValueError) as error:  # a bad sector, no permission, a name that no file can have
            return f"{name} can't be read: {getattr(error, 'strerror', None) or error}"
    return None


def clear_staging(ckpt_dir: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for leftover in ckpt_dir.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def quarantine(folder: Path, suffix: str) -> Path:
    """Rename a checkpoint out of the way; nothing is deleted."""
    for i in range(1, 10000):
        aside = folder.with_name(f"{folder.name}.{suffix}" + (f"{i}" if i > 1 else ""))
        if not aside.exists():
            os.rename(folder, aside)
            return aside
    raise OSError(f"{folder} has too many copies set aside")


def published(run: Path) -> list[Path]:
    """The checkpoint folders of a run by their names, oldest first; not verified."""
    found = [path for path in (run / "ckpt").glob("step*") if NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name. Raises InputError for another name."""
    match = NAME.match(folder.resolve().name)
    if not match:
        raise InputError(f"{folder} is not a checkpoint folder (stepNNNNNN)")
    return int(match[1])


def is_checkpoint_name(folder: Path) -> bool:
    return NAME.match(folder.resolve().name) is not None


def newest(run: Path, report: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """(the newest good checkpoint of a run or None, the newer ones that are not good, each reported with why)."""
    bad = []
    for folder in reversed(published(run)):
        why = problem(folder)
        if why is None:
            return folder, bad
        report(f"skipping checkpoint {folder.name}: {why}")
        bad.append(folder)
    return None, bad


def mark_best(run: Path, step: int) -> None:
    """Let ckpt/best point to the checkpoint of `step`; no link where that was set aside."""
    best, target = run / "ckpt" / "best", folder_name(step)
    if best.is_symlink() and os.readlink(best) == target and best.exists():
        return
    temporary = best.with_name(".best.tmp")
    temporary.unlink(missing_ok=True)
    if (run / "ckpt" / target).is_dir():
        temporary.symlink_to(target)
        os.replace(temporary, best)
    elif best.is_symlink():
        best.unlink()


def prune(run: Path, keep_last: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints; the target of ckpt/best stays."""
    best = (run / "ckpt" / "best").resolve()
    for folder in published(run)[: -keep_last if keep_last else None] if keep_last else []:
        if folder.resolve() != best:
            doomed = folder.with_name(f".staging-{folder.name}")  # out of sight by one rename before files go
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read_optimizer(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError for anything else."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors' own error type, or the file system's
        raise InputError(f"weights {path} can't be read: {error}") from None


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing for one without, or for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load by name and shape, strictly. Raises InputError that names what differs."""
    shapes = lambda state: {name: list(value.shape) for name, value in state.items()}
    differ = differences(shapes(model.state_dict()), shapes(weights))
    if differ:
        raise InputError(f"{source} holds weights of another architecture: {differ}")
    model.load_state_dict(weights)


def verify(argv: list[str]) -> int:
    """`python -m utils.checkpoint verify RUN`: a line per checkpoint; status 0 where every one is good, else 1."""
    if len(argv) != 2 or argv[0] != "verify":
        raise InputError("usage: python -m utils.checkpoint verify RUN (a run folder or a checkpoint folder)")
    place = Path(argv[1])
    found = [place] if is_checkpoint_name(place) and place.is_dir() else published(place)
    if not found:
        raise InputError(f"{place}: {'no checkpoint in it' if place.is_dir() else 'no such folder'}")
    problems = {folder: problem(folder) for folder in found}
    for folder, why in problems.items():
        print(f"{folder.name}  {'good' if why is None else f'BAD: {why}'}")
    best = found[0].parent / "best"
    if best.is_symlink() and not best.exists():
        print(f"best  BAD: points to {os.readlink(best)}, which is not there")
        return 1
    return int(any(problems.values()))


if __name__ == "__main__":
    run_script(verify)
