"""When training ends before its last step: the wall-time limit, and gradients that stay non-finite."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.errors import TrainingDiverged


class StopRule:
    """Decides, on all processes alike, whether to go on."""

    CHECK_EVERY = 10  # updates; the wall-time check is a collective

    def __init__(self, accelerator: Accelerator, options) -> None:
        self.accelerator, self.started = accelerator, time.monotonic()
        self.max_hours, self.max_bad_steps = options.max_hours, options.max_bad_steps

    def time_is_up(self, done: int) -> bool:
        """True, on every process, at the first update divisible by CHECK_EVERY after train.max_hours."""
        if self.max_hours is None or done % self.CHECK_EVERY:
            return False
        late = torch.tensor(float(time.monotonic() - self.started > self.max_hours * 3600))
        late = late.to(self.accelerator.device)
        return bool(self.accelerator.reduce(late, "sum") > 0)

    def skip_if_bad(self, optimizer, bad: Tensor) -> None:
        """Let the fused optimizer leave everything as it is where `bad` is 1, without waiting for the device.

        Under fp16 the loss scaler does the same.
        """
        if self.accelerator.scaler is None:
            optimizer.optimizer.found_inf = bad.reshape(())

    def check_bad(self, bad_in_row: int, log) -> None:
        """Tell train.log and raise TrainingDiverged after train.max_bad_steps non-finite gradients in a row."""
        if bad_in_row >= self.max_bad_steps:
            why = (
                f"{bad_in_row} updates in a row had a non-finite gradient "
                f"(train.max_bad_steps = {self.max_bad_steps}); the last good checkpoint in {log.run} is untouched: "
                "lower train.lr or use another precision"
            )
            log.record(f"stopped     {why}")
            raise TrainingDiverged(why)
