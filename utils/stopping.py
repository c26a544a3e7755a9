"""When training ends before its last step: signals, the wall-time limit, and gradients that stay non-finite."""

from __future__ import annotations

import signal
import threading
import time

import torch
from accelerate import Accelerator
from torch import Tensor

from utils.errors import TrainingDiverged

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TIME_IS_UP = -1


class StopRule:
    """Decides, on all processes alike, whether to go on. As a context it listens to SIGNALS.

    A signal to any process stops all at the next update divisible by CHECK_EVERY, so that no collective is paid at
    every step. A second Ctrl-C, a second or more after the first, leaves at once (a launcher passes the first one on
    to processes that the terminal has told already).
    """

    CHECK_EVERY = 10  # updates

    def __init__(self, accelerator: Accelerator, options) -> None:
        self.accelerator, self.started = accelerator, time.monotonic()
        self.max_hours, self.max_bad_steps = options.max_hours, options.max_bad_steps
        self.received, self.received_at, self.reason = 0, 0.0, 0

    def __enter__(self) -> StopRule:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received == number and time.monotonic() - self.received_at > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.received_at = number, time.monotonic()

    def wants_stop(self, done: int) -> bool:
        """Whether to save and stop after `done` updates; the same on every process. Sets `reason`."""
        if done % self.CHECK_EVERY:
            return False
        late = self.max_hours is not None and time.monotonic() - self.started > self.max_hours * 3600
        found = [self.received or (TIME_IS_UP if late else 0)]
        if self.accelerator.num_processes > 1:
            found = self.accelerator.gather(torch.tensor(found, device=self.accelerator.device)).tolist()
        self.reason = max(found) or min(found)
        return self.reason != 0

    @property
    def status(self) -> int:
        """The exit status of a stopped run: 128 + the signal's number; 0 where the time was up."""
        return 128 + self.reason if self.reason > 0 else 0

    def describe(self) -> str:
        return f"{self.max_hours:g} hours" if self.reason == TIME_IS_UP else signal.Signals(self.reason).name

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
