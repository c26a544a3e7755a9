"""What a run folder tells: configuration, progress, curves, pictures, scores, system, checkpoints, commands."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from utils import checkpoint
from utils.config import KEYS, differences, merge, read_yaml, to_yaml
from utils.curves import SCORE, panels, points, read_metrics, svg
from utils.embedded import Picture, embed, spread
from utils.errors import InputError
from utils.results import tables
from utils.run_times import duration, read_log, seconds_trained, starts
from utils.state import read_state

MOST_PREVIEWS, MOST_SAMPLES = 12, 12
SYSTEM = ("machine", "hardware", "software", "network", "data", "condition", "steps", "warning")
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Checkpoint:
    name: str
    size: str
    written: str
    status: str  # "good", or what is wrong
    good: bool
    best: bool


@dataclass(frozen=True)
class RunSummary:
    """A run folder, read once; texts are plain, not HTML, but `curves`, which are <svg> elements."""

    name: str
    folder: str
    facts: Pairs
    curves: list[str]
    previews: list[Picture]
    previews_left_out: int
    samples: list[Picture]
    scores: list[tuple[str, list[list[str]]]]  # title, rows of cells with the header first
    system: Pairs
    changed: list[tuple[str, str, str]]  # key, value, the schema's default
    config: str
    checkpoints: list[Checkpoint]
    commands: Pairs  # what for, command line


def read_run(folder: Path) -> RunSummary:
    """Verifies every checkpoint by its sums, which reads all of it.

    Raises:
        InputError: no run folder, or a configuration that can't be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {'a file, not a run folder' if folder.exists() else 'no such run folder'}")
    stored = folder / "config.yaml"
    if checkpoint.is_checkpoint_name(folder) and not (folder / "ckpt").is_dir():
        raise InputError(f"{folder} is a checkpoint: give its run folder, {folder.resolve().parent.parent}")
    if not stored.is_file():
        raise InputError(f"{folder} is not a run folder: it holds no config.yaml")
    config = merge((str(stored), read_yaml(stored)))
    rows, checkpoints = read_metrics(folder / "metrics.jsonl"), _checkpoints(folder)
    log = read_log(folder / "train.log")
    previews = sorted((folder / "samples").glob("step*.png"), key=lambda path: (len(path.name), path.name))
    grids = sorted((folder / "images").glob("*-grid.png"))
    return RunSummary(
        name=folder.resolve().name,
        folder=str(folder),
        facts=_facts(config, rows, checkpoints, log, folder),
        curves=[svg(title, lines) for title, lines in panels(rows).items()],
        previews=[embed(path, f"step {int(path.stem[4:]):,}" if path.stem[4:].isdigit() else path.stem)
                  for path in spread(previews, MOST_PREVIEWS)],
        previews_left_out=max(0, len(previews) - MOST_PREVIEWS),
        samples=[embed(path, _made_by(path)) for path in grids[:MOST_SAMPLES]],
        scores=_scores(folder, rows),
        system=_system(folder, checkpoints, rows, log),
        changed=_changed(config),
        config=to_yaml(config),
        checkpoints=checkpoints,
        commands=_commands(folder, config, checkpoints),
    )  # fmt: skip


def _checkpoints(folder: Path) -> list[Checkpoint]:
    best = (folder / "ckpt" / "best").resolve()
    aside = [path for path in sorted((folder / "ckpt").glob("step*.*")) if path.is_dir()]
    found = []
    for path in [*checkpoint.published(folder), *aside]:
        why = checkpoint.problem(path) if path not in aside else "set aside: not used"
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        written = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
        found.append(Checkpoint(path.name, _bytes(size), written, why or "good", why is None, path.resolve() == best))
    return found


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def _facts(config: DictConfig, rows: list[dict], checkpoints: list[Checkpoint], log: list, folder: Path) -> Pairs:
    done = max((int(step) for step, _ in points(rows, "step")), default=0)
    opts, aim = config.train, config.train.n_steps
    if opts.n_epochs is not None:
        steps = next((text for _, word, text in reversed(log) if word == "steps"), "")
        match = re.search(r" to ([\d,]+) \(", steps)
        aim = int(match[1].replace(",", "")) if match else None
    of = f" of {aim:,}" if aim else ""
    found = [("logged up to step", f"{done:,}{of}"), ("images seen", f"{done * opts.batch_size:,}")]
    for name, label in (("loss", "loss"), ("valid_loss_ema", "validation loss, EMA")):
        if values := points(rows, name):
            found.append((label, f"{values[-1][1]:.4g}"))
    names = sorted({name for row in rows for name in row if SCORE.fullmatch(name)})
    for name in names:
        step, value = min(points(rows, name), key=lambda point: point[1], default=(None, None))
        if step is not None:
            found.append((f"best {name}", f"{value:.4g} at step {step:,}"))
    if seconds := seconds_trained(log):
        found.append(("training time", duration(seconds)))
    good = sum(point.good for point in checkpoints)
    bad = f", {len(checkpoints) - good} not" if good < len(checkpoints) else ""
    return [*found, ("checkpoints", f"{good} good{bad}")]


def _made_by(grid: Path) -> str:
    """The folder's name and, where its protocol.json says so, sampler and steps."""
    name = grid.name.removesuffix("-grid.png")
    try:
        identity = json.loads((grid.parent / name / "protocol.json").read_text())["identity"]
        steps = f"{len(identity['timesteps'])} {identity['skip_type']} steps"
        sampler = "" if name == identity["sampler"] else f"{identity['sampler']}, "
        return f"{name}: {sampler}{steps}, seed {identity['seed']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return name


def _scores(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """Tables of each RUN/scores/stepNNNNNN/results.json, then the scores that training logged."""
    found = []
    for path in sorted((folder / "scores").glob("step*/results.json"), reverse=True):
        step = path.parent.name
        try:
            scored = json.loads(path.read_text())["rows"]
            sums = {row["protocol"].get("source", {}).get("weights_sha256") for row in scored}
            whose = _whose(folder / "ckpt" / step, sums)
            found += [(f"{step}: {title.replace('**', '')}{whose}", table) for title, table in tables(scored)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
            found.append((f"{path.relative_to(folder)} can't be read", []))
    names = sorted({name for row in rows for name in row if SCORE.fullmatch(name)})
    if names:
        steps = spread([row for row in rows if any(name in row for name in names)], 20)
        table = [["step", *names]]
        table += [[f"{row['step']:,}", *(f"{row[name]:.4g}" if name in row else "" for name in names)] for row in steps]
        found.append(("while training, of the EMA weights", table))
    return found


def _whose(folder: Path, sums: set[str | None]) -> str:
    """What to add where a score is not of the weights that the checkpoint holds now."""
    if not folder.is_dir():
        return " (this checkpoint is no longer here)"
    try:
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())["sha256"]
        here = {manifest["ema.safetensors"], manifest["model.safetensors"]}
    except (OSError, ValueError, KeyError, TypeError):
        return " (the checkpoint's manifest can't be read)"
    return "" if sums <= here else " (of other weights than this checkpoint holds now)"


def _system(folder: Path, checkpoints: list[Checkpoint], rows: list[dict], log: list) -> Pairs:
    """What the last start said of the machine and the work, what was resolved, and the speed."""
    said = {word: text for _, word, text in log}  # a later start overwrites
    found = [(word, said[word]) for word in SYSTEM if word in said]
    good = [point for point in checkpoints if point.good]
    if good:
        try:
            resolved = read_state(folder / "ckpt" / good[-1].name).get("resolved") or {}
        except InputError:
            resolved = {}
        found += [(f"{name.replace('_', ' ')} (resolved)", str(value).lower()) for name, value in resolved.items()]
    if rates := [rate for _, rate in points(rows, "images_per_second")]:
        found.append(("throughput", f"{statistics.median(rates):,.0f} images per second (median), "
                      f"{min(rates):,.0f} to {max(rates):,.0f}"))  # fmt: skip
    if log:
        found.append(("starts", f"{starts(log)}, from {log[0][0]:%Y-%m-%d %H:%M} to {log[-1][0]:%Y-%m-%d %H:%M}"))
    return found


def _changed(config: DictConfig) -> list[tuple[str, str, str]]:
    return [(name, str(new), str(old)) for name, (old, new) in differences(merge(), config).items() if name in KEYS]


def _commands(folder: Path, config: DictConfig, checkpoints: list[Checkpoint]) -> Pairs:
    """Command lines, to be run where the scripts are."""
    run, launch = shlex.quote(str(folder)), "accelerate launch"
    out = shlex.quote(f"out/{folder.resolve().name}")
    found = [("go on training", f"{launch} train_ddpm.py -e {run} -r auto --train.n_steps {2 * config.train.n_steps}")]
    if any(point.good for point in checkpoints):
        data = config.data
        reference, where = data.name, f" --data.root {shlex.quote(str(data.root))}"
        if data.name == "image_folder":
            reference, where = shlex.quote(str(data.root)), ""
        elif data.root == KEYS["data.root"].default:
            where = ""
        told = (
            "" if config.model.condition == "none" else " --labels all" if config.model.classes else " --prompts TEXT"
        )
        found += [
            ("sample", f"{launch} sample_ddpm.py --weights {run} --n_samples 64 --save_dir {out}{told}"),
            ("score", f"{launch} evaluate_ddpm.py --weights {run} --reference {reference}{where}"),
            ("export", f"python convert_ddpm.py --weights {run} --to diffusers --out {out}-diffusers"),
        ]
    return [*found, ("verify the checkpoints", f"python -m utils.checkpoint verify {run}"),
            ("write this page again", f"python -m utils.report {run}")]  # fmt: skip
