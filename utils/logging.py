"""What a run tells: lines for a person (terminal and train.log), numbers for a program (metrics.jsonl, TensorBoard)."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint import folder_name, write_atomically
from utils.compilation import Recompiles
from utils.curves import draw_curves, read_metrics
from utils.distributed import from_main
from utils.errors import SaveFailed
from utils.images import enlarge, write_png
from utils.process import signal_left
from utils.protocol import hardware, versions
from utils.utilisation import Utilisation

REDRAW = 60  # seconds between drawings of the curves, which take as long as many steps of a small network


class RunLog:
    """Logs of one run folder. Only the main process writes; the others' calls do nothing. As a context: the bar."""

    def __init__(
        self, accelerator: Accelerator, run: Path, step: int, n_steps: int, config: DictConfig | None = None
    ) -> None:
        """Opens the logs at `step`: lines of metrics.jsonl beyond it belong to work that was lost, and go.

        Raises:
            SaveFailed: the file can't be written; on every process.
        """
        self.accelerator, self.run, self.main = accelerator, run, accelerator.is_main_process
        self.utilisation = Utilisation(config, accelerator) if config is not None else lambda rate: {}
        self.recompiles = Recompiles()
        self.metrics_path = run / "metrics.jsonl"
        self.bar, self.step, self.n_steps, self.unwritten = None, step, n_steps, set()
        why = None
        if self.main:
            try:
                cut_metrics(self.metrics_path, step)
            except OSError as error:
                why = f"{self.metrics_path} can't be rewritten: {error.strerror}"
        if why := from_main(accelerator, why):  # no process goes on alone
            raise SaveFailed(why)
        threading.excepthook = _leave_disk_errors_to_the_caller
        tracker = {"tensorboard": {"purge_step": step + 1}}
        accelerator.init_trackers("tensorboard", init_kwargs=tracker)
        self.clock, self.clock_step = time.monotonic(), step
        self.drawn, self.redraw = -float("inf"), step > 0  # the process before may have died without

    def say(self, text: str) -> None:
        """A line on the terminal and, with the time, in train.log."""
        if self.main:
            tqdm.write(text, file=sys.stderr)
        self.record(text)

    def record(self, text: str) -> None:
        """A line in train.log alone."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        self._write("train.log", lambda: append_line(self.run / "train.log", line))

    def _write(self, what: str, write: Callable[[], Any], everywhere: bool = False) -> None:
        """Write a file of the log on the main process. One that can't be is told once: training is worth more."""
        try:
            if self.main or everywhere:
                write()
        except OSError as error:
            if what not in self.unwritten:
                tqdm.write(f"warning: {what} can't be written: {error.strerror}; training goes on", file=sys.stderr)
            self.unwritten.add(what)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and as many TensorBoard scalars."""
        self._write("metrics.jsonl", lambda: append_line(self.metrics_path, json.dumps({"step": step, **values})))
        scalars = {name: float(value) for name, value in values.items()}
        self._write("tensorboard", lambda: self.accelerator.log(scalars, step=step))

    def preview(self, step: int, picture: Tensor) -> None:
        """A grid of samples, uint8 [C, H, W], as samples/stepNNNNNN.png and in TensorBoard."""
        self._write("samples/", lambda: self._write_preview(step, picture))

    def _write_preview(self, step: int, picture: Tensor) -> None:
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        write_png(folder / f"step{step:06d}.png", enlarge(picture))
        for tracker in self.accelerator.trackers:
            tracker.log_images({"samples": picture[None].numpy()}, step=step)

    def saved(self, step: int) -> None:
        """Tell of a checkpoint, and draw the curves up to it: at once, or where that was done just now, at the end."""
        self.say(f"saved       {self.run / 'ckpt' / folder_name(step)}")
        self.redraw = True
        if time.monotonic() - self.drawn > REDRAW:
            self._draw()

    def _draw(self) -> None:
        self._write("curves.png", lambda: draw_curves(self.run))
        gc.collect()  # a figure is a knot of cycles, which Python would leave lying for hours: 3 MB each
        self.drawn, self.redraw = time.monotonic(), False

    def rate(self, step: int, batch_size: int) -> dict[str, float]:
        """Images per second since the last call; once known, the utilisation (mfu); a compiled network's recompiles."""
        rate = (step - self.clock_step) * batch_size / max(time.monotonic() - self.clock, 1e-9)
        shown = {"images_per_second": round(rate, 1)} | self.utilisation(rate) | self.recompiles()
        self.clock, self.clock_step = time.monotonic(), step  # without the measurement of the machine
        return shown

    def progress(self, **shown: float) -> None:
        """One step further; numbers beside the bar where any are given."""
        if self.bar is None:  # made at the first step, so that it does not stand above the banner
            self.bar = tqdm(
                total=self.n_steps,
                initial=self.step,
                desc="train",
                unit="step",
                disable=not self.main,
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 15,
            )
        if shown:
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
        self.bar.update()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.redraw:
            self._draw()

    def close(self) -> None:
        """Finish the trackers and the process group."""
        if self.redraw:
            self._draw()
        self._write("tensorboard", self.accelerator.end_training, everywhere=True)


def _leave_disk_errors_to_the_caller(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread hands its error to the next call, which tells of it; no traceback besides."""
    if type(error.thread).__name__ != "_AsyncWriterThread" or not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def append_line(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def cut_metrics(path: Path, step: int) -> None:
    """Drop what lies beyond `step`."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in kept)))


def banner(
    log: RunLog, run, net, process, batches, conditions, held_out, resolved: dict, start: int, n_steps: int
) -> None:
    """What is about to happen, and when it ends."""
    cfg, opts, n = run.config, run.config.train, len(batches)
    device, switches = log.accelerator.device.type, [name for name in ("compile", "deterministic") if resolved[name]]
    threads = f" with {torch.get_num_threads()} threads" if device == "cpu" else ""
    lines = {
        "run folder": run.folder.resolve(),
        "machine": f"{log.accelerator.num_processes} x {device}{threads}, precision {resolved['mixed_precision']}"
        + "".join(f", {name}" for name in switches),
        "network": f"{cfg.model.name}, {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"EMA decay {opts.ema_decay:g}",
        "data": f"{batches.images.name}, {n:,} images of {cfg.data.channels} x {cfg.data.image_size}^2, "
        f"{'in memory' if batches.cached is not None else 'read by workers'}; "
        f"validation {'none' if held_out is None else f'{len(held_out):,} images'}",
        "steps": f"{f'from {run.checkpoint.name}' if run.checkpoint else 'from the start'} to {n_steps:,} "
        f"({n_steps * opts.batch_size / n:.1f} epochs) of {opts.batch_size} images, "
        f"{min(opts.micro_batch or batches.share, batches.share)} at a time"
        + (f", or until {opts.max_hours:g} hours are over" if opts.max_hours else ""),
        "every": f"{opts.save_every:,} steps a checkpoint, {opts.sample_every:,} a preview, "
        f"{opts.valid_every:,} a validation, and at the end",
    }
    if net.condition is not None:
        lines["condition"] = f"{conditions.describe()}, {opts.condition_dropout:.0%} dropped"
    if opts.warmup_steps > n_steps:
        lines["warm-up"] = (
            f"warning: train.warmup_steps = {opts.warmup_steps:,} is longer than the training, whose learning rate "
            f"never reaches train.lr = {opts.lr:g}; better, such as --train.warmup_steps {n_steps // 20}"
        )
    if warning := signal_left(process):
        lines["warning"] = warning
    if start >= n_steps:
        lines["finished"] = f"step {start:,} of {n_steps:,} is done: nothing to do (more: --train.n_steps N)"
    for name, text in lines.items():
        log.say(f"{name:12}{text}")
    log.record(f"{'software':12}{', '.join(f'{name} {version}' for name, version in versions().items())}")
    log.record(f"{'hardware':12}{hardware(log.accelerator.device)}")
