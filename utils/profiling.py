"""`train.profile` and `sample_ddpm.py --profile`: where the time goes, and a Chrome trace for ui.perfetto.dev."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SKIPPED, TIMED, WARM_UP, TRACED = 5, 15, 2, 5  # steps: not looked at, timed, while the profiler settles, in the trace
NEEDED = SKIPPED + TIMED + WARM_UP + TRACED


class TrainingProfile:
    """Shares of a step, from `mark(name)` after each of its parts; then a trace. Off: every call does nothing."""

    def __init__(self, enabled: bool, log) -> None:
        """log: the run's RunLog."""
        self.on, self.folder, self.log = enabled and log.main, log.run, log
        self.steps, self.seconds, self.last, self.tracer = 0, {}, 0.0, None

    def mark(self, name: str) -> None:
        """What happened since the last mark was `name`."""
        if not self.on or self.steps >= SKIPPED + TIMED:  # the traced steps wait for nothing
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.steps >= SKIPPED:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def step(self, name: str) -> None:
        """`mark` of the last part of a training step, which is over."""
        if not self.on:
            return
        self.mark(name)
        self.steps += 1
        if self.steps == SKIPPED + TIMED:
            total = sum(self.seconds.values())
            self.log.say(
                f"profile     {1e3 * total / TIMED:.1f} ms per step, steps {SKIPPED + 1} to {self.steps} of this start"
            )
            for name, value in sorted(self.seconds.items(), key=lambda item: -item[1]):
                self.log.say(f"            {value / total:6.1%} {1e3 * value / TIMED:9.2f} ms  {name}")
            schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
            self.tracer = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self.tracer.start()
        elif self.tracer is not None:
            self.tracer.step()
            if self.steps == NEEDED:
                self.tracer.stop()
                self.on, self.tracer = False, None
        self.last = time.perf_counter()

    def __enter__(self) -> TrainingProfile:
        return self

    def __exit__(self, *_) -> None:
        if self.on and self.steps:
            if self.tracer is not None:
                self.tracer.on_trace_ready = None  # what it saw ends in the middle
                self.tracer.stop()
            self.log.say(f"profile     needs {NEEDED} steps of one start, this one had {self.steps}")

    def _write(self, tracer) -> None:
        tracer.export_chrome_trace(str(self.folder / "trace.json"))
        self.log.say(f"            the most time is spent in {most_time(tracer)}")
        self.log.say(f"trace       {self.folder / 'trace.json'}: {TRACED} steps, for ui.perfetto.dev")


def most_time(tracer, n: int = 4) -> str:
    """The n operations with the largest time of their own, with their shares."""
    rows = [row for row in tracer.key_averages() if not row.key.startswith("ProfilerStep")]
    own = {row.key: row.self_device_time_total for row in rows}  # where there is a GPU, what the host waits is not work
    own = own if any(own.values()) else {row.key: row.self_cpu_time_total for row in rows}
    total = sum(own.values()) or 1
    largest = sorted(own.items(), key=lambda item: -item[1])[:n]
    return ", ".join(f"{name[:60]} {value / total:.0%}" for name, value in largest)


class Timed:
    """A network that adds up the time of its calls."""

    def __init__(self, net) -> None:
        self.net, self.seconds = net, 0.0

    def __getattr__(self, name: str):
        return getattr(self.net, name)

    def __call__(self, *args, **kwargs):
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        wait()
        start = time.perf_counter()
        out = self.net(*args, **kwargs)
        wait()
        self.seconds += time.perf_counter() - start
        return out


@contextmanager
def sampling_profile(path: Path | None, net, writer) -> Iterator:
    """Yields the network to generate with; then says where the time went, and writes a trace to `path`, if any.

    writer: has `seconds`, what handing over pictures took.
    """
    if path is None:
        yield net
        return
    timed = Timed(net)
    with torch.profiler.profile() as tracer:
        start = time.perf_counter()
        yield timed
        total = time.perf_counter() - start  # without what the tracer itself does at its end
    shares = {"network": timed.seconds, "waiting for PNG writers": writer.seconds}
    shares["noise, sampler, quantisation, transfers"] = total - sum(shares.values())
    print(f"profile: {total:.2f} s")
    for name, value in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {value / total:6.1%} {value:9.3f} s  {name}")
    print(f"  the most time is spent in {most_time(tracer)}")
    tracer.export_chrome_trace(str(path))
    print(f"trace: {path}, for ui.perfetto.dev")
