"""Kill trainings and generations with SIGKILL, again and again, and check that the end is as if nothing had happened.

    PYTHONPATH=. python tests/chaos.py [--staged 5] [--random 100] [--generation 40] [--two_processes 24] [--out DIR]

Staged kills fall at every moment at which a run writes (tests/kill_at.py), `--staged` times each; random ones at any
time after the start of a process, once there is something to lose. After every kill, the same command again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import ROOT, environment
from in_process import end_of, fork
from kill_at import Death, arm
from safetensors.torch import load_file

from utils import checkpoint
from utils.state import read_state

# Dropout, bf16, an uneven last micro-batch, five epoch boundaries; logs, validation and previews off the grid of saves.
TRAIN = [
    *("--model.dim", "8", "--model.norm_groups", "4", "--model.dim_mults", "[1,2]", "--model.dropout", "0.1"),
    *("--data.valid_fraction", "0.9", "--train.batch_size", "12", "--train.micro_batch", "5", "--train.n_steps", "120"),
    *("--train.mixed_precision", "bf16", "--train.save_every", "5", "--train.keep_last", "2", "--train.log_every", "3"),
    *("--train.valid_every", "40", "--train.n_valid", "16", "--train.sample_every", "50", "--train.n_samples", "4"),
    *("--train.warmup_steps", "2", "--sample.skip_steps", "3"),
]
SAMPLE = ["--n_samples", "192", "--micro_batch", "4", "--sampler", "fixed-small", "--skip_steps", "25"]
STARTED = ("every       ", " to make: ")  # what the scripts say once they begin to work


@dataclass
class Job:
    """A command that can be killed and started again; it writes below one folder."""

    script: str
    args: list[str]  # PLACE stands for the folder
    safe: Callable[[Path], int]  # what a folder has that can't be lost: a checkpoint's step, or images; 0: nothing
    same: Callable[[Path, Path], None]  # raises AssertionError where two folders differ
    processes: int = 1
    kills: Counter = field(default_factory=Counter)  # moment -> how often
    losses: list[str] = field(default_factory=list)  # what a kill cost, or left different; must stay empty

    def start(self, place: Path, **variables: str) -> subprocess.Popen:
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        args = [word.replace("PLACE", str(place)) for word in self.args]
        return subprocess.Popen(
            [*launcher, str(ROOT / "tests/kill_at.py"), self.script, *args], env=environment() | variables,
            stdout=open(log_of(place), "w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def finish(self, place: Path, **variables: str) -> float:
        """Run to the end without a kill; returns the seconds until there was something to lose."""
        began, first, process = time.monotonic(), None, self.start(place, **variables)
        while process.poll() is None:
            time.sleep(0.1)
            if first is None and self.safe(place):
                first = time.monotonic() - began
        assert process.returncode == 0, f"status {process.returncode}\n{log_of(place).read_text()[-4000:]}"
        return first or time.monotonic() - began

    def kill(self, place: Path, moment: str | None = None, nth: int = 1, delay: float = 0) -> bool:
        """One life, killed at the nth `moment` or after `delay` seconds; False where it ended before that."""
        before = self.safe(place)
        status = self.die_at(place, moment, nth) if moment else self.die_after(place, delay)
        said = log_of(place).read_text()
        died = status == -signal.SIGKILL if self.processes == 1 else status != 0 and "SIGKILL" in said
        assert died or status == 0, f"status {status}\n{said[-4000:]}"
        if self.safe(place) < before:
            self.losses.append(f"{place.name}, {moment}: of {before}, {self.safe(place)} is left")
        if died:
            self.kills[moment or f"at random, {phase(place, said)}"] += 1
        return died

    def die_at(self, place: Path, moment: str, nth: int) -> int:
        """In a fork of this process, which spares the imports."""
        args = [word.replace("PLACE", str(place)) for word in self.args]
        main = importlib.import_module(self.script.removesuffix(".py")).main
        return end_of(fork(main, args, place.parent, log_of(place), lambda: arm(Death(moment, nth))))

    def die_after(self, place: Path, delay: float) -> int:
        process = self.start(place)
        try:
            return process.wait(delay)
        except subprocess.TimeoutExpired:
            self.strike(process.pid)
            return process.wait(120)

    def strike(self, pid: int) -> None:
        """Kill the process; of a launcher's, one or all."""
        workers = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        if self.processes > 1 and workers:
            workers = workers if random.random() < 0.5 else [random.choice(workers)]
        for victim in workers if self.processes > 1 else [pid]:
            os.kill(victim, signal.SIGKILL)


def log_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def phase(place: Path, said: str) -> str:
    """What a process was doing when it died."""
    if any((place / "ckpt").glob(".staging-*")):
        return "saving"
    return "working" if any(text in said for text in STARTED) else "starting"


def newest_step(run: Path) -> int:
    good, _ = checkpoint.newest(run, lambda line: None)
    return checkpoint.step_of(good) if good else 0


def metrics(run: Path) -> list[dict]:
    """All of metrics.jsonl but the speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("images_per_second", "mfu")} for row in rows]


def same_tree(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tree(a, b) for a, b in zip(one, other))
    return one == other


def same_checkpoint(one: Path, other: Path) -> None:
    """Weights, EMA, optimizer and counters are equal bit for bit."""
    assert checkpoint.problem(one) is None and checkpoint.problem(other) is None
    for name in ("model.safetensors", "ema.safetensors"):
        assert same_tree(load_file(one / name), load_file(other / name)), name
    assert same_tree(checkpoint.read_optimizer(one), checkpoint.read_optimizer(other)), "optimizer.pt"
    assert read_state(one) == read_state(other), "state.json"


def same_run(one: Path, other: Path) -> None:
    """Metrics and every checkpoint that is kept."""
    assert metrics(one) == metrics(other), "metrics.jsonl"
    steps = [path.name for path in checkpoint.published(one)]
    assert steps == [path.name for path in checkpoint.published(other)], "which checkpoints are kept"
    assert not list((other / "ckpt").glob(".*")), "leftovers in ckpt"
    for step in steps:
        same_checkpoint(one / "ckpt" / step, other / "ckpt" / step)


def images(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("[!.]*.png")}


def same_images(one: Path, other: Path) -> None:
    """Images, grid, and nothing else in their folder."""
    assert images(one) == images(other), "images"
    assert sorted(os.listdir(one / "images")) == sorted(os.listdir(other / "images")), "files beside the images"


def training(processes: int = 1) -> Job:
    return Job("train_ddpm.py", ["-e", "PLACE", "-r", "auto", *TRAIN], newest_step, same_run, processes)


def generation(weights: Path) -> Job:
    args = ["--weights", str(weights), "--save_dir", "PLACE/images", *SAMPLE]
    return Job("sample_ddpm.py", args, lambda place: len(images(place)), same_images)


def moments(place: Path) -> dict[str, int]:
    """The moments at which the uninterrupted command wrote, and how often."""
    lines = [line.split("\t") for line in place.with_name("moments.txt").read_text().splitlines()]
    return {moment: int(n) for n, moment in lines}


def torment(job: Job, folder: Path, staged: int, n_random: int, report: Callable[[str], None] = print) -> dict:
    """Kill `staged` times at every moment and n_random times at random, in as many rounds as it takes.

    A round is one run from nothing to its end, which must equal that of the uninterrupted run folder/whole.
    """
    whole, n_rounds = folder / "whole", 0
    folder.mkdir()
    start = job.finish(whole, MOMENTS=str(folder / "moments.txt"))
    often = moments(whole)
    todo = [moment for moment in often for _ in range(staged)]
    random.shuffle(todo)
    while todo or n_random > 0:
        n_rounds, lives = n_rounds + 1, True
        place = folder / f"round{n_rounds}"
        while lives and (todo or n_random > 0):
            if random.random() < n_random / (n_random + len(todo)):
                at_stake = job.safe(place) > 0
                lives = job.kill(
                    place, delay=random.uniform(0, start) if random.random() < 0.3 else start + 3 * random.random()
                )
                n_random -= lives and at_stake
            else:
                lives = job.kill(place, todo[0], nth=random.choice((1, 2)) if often[todo[0]] > 20 else 1)
                todo = todo[1:] if lives else todo[1:] + todo[:1]  # it had no such moment left: in the next round
            report(f"round {n_rounds}: {sum(job.kills.values())} kills; {len(todo)} staged, {n_random} random to come")
        job.finish(place)
        try:
            job.same(whole, place)
            shutil.rmtree(place)
        except AssertionError as error:  # the folder stays, to be looked into
            job.losses.append(f"{place.name} differs: {str(error).splitlines()[0]}")
    return {
        "kills": sum(job.kills.values()),
        "rounds": n_rounds,
        "losses": len(job.losses),
        "lost": job.losses,
        "moments": dict(sorted(job.kills.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--staged", type=int, default=5, metavar="N", help="kills at every moment of writing")
    add("--random", type=int, default=100, metavar="N", help="kills of a training at random times")
    add("--generation", type=int, default=40, metavar="N", help="kills of a generation at random times")
    add("--two_processes", type=int, default=24, metavar="N", help="kills of a training on two processes")
    add("--out", type=Path, default=ROOT / "runs/chaos", metavar="DIR", help="a new folder; summary.json in it")
    options = parser.parse_args()
    random.seed(0)
    began, summary = time.monotonic(), {}
    options.out.mkdir(parents=True)
    say = lambda line: print(f"{(time.monotonic() - began) / 60:6.1f} min  {line}", flush=True)
    out = options.out.resolve()
    summary["training"] = torment(training(), out / "training", options.staged, options.random, say)
    weights = out / "training/whole"
    summary["generation"] = torment(generation(weights), out / "generation", options.staged, options.generation, say)
    summary["training on two processes"] = torment(training(2), out / "two", 0, options.two_processes, say)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))
    sys.exit(any(part["losses"] for part in summary.values()))


if __name__ == "__main__":
    main()
