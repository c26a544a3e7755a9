"""`train.profile`: a Chrome trace of a few steps, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

WAIT, WARM_UP, ACTIVE = 5, 5, 5  # steps before, while the profiler settles, and in the trace


def profiler(enabled: bool, run: Path, main: bool) -> AbstractContextManager:
    """A context whose value has `step()`; writes RUN/trace.json after WAIT + WARM_UP + ACTIVE of them."""
    if not (enabled and main):
        return nullcontext(_Nothing())
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(run / "trace.json")),
    )


class _Nothing:
    def step(self) -> None:
        pass
