"""Running loss, gradient norm and non-finite updates, kept on the device and read only when something is logged."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

NAMES = ("loss", "steps", "grad_norm", "bad", "bad_in_row")


class Meter:
    """Sums since the last log line; `state()` is part of a checkpoint, from which a resumed run goes on exactly."""

    def __init__(self, accelerator: Accelerator, state: dict[str, float] | None = None) -> None:
        self.accelerator = accelerator
        self._set(state or dict.fromkeys(NAMES, 0.0))

    def _set(self, state: dict[str, float]) -> None:
        values = dict(state)
        if not self.accelerator.is_main_process:
            values["loss"] = 0.0  # each process adds its part of the loss; the past is carried by the main one
        self.sums = torch.tensor([values[n] for n in NAMES], dtype=torch.float64, device=self.accelerator.device)

    def update(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Count one optimizer update; returns a float32 scalar, 1 where its gradient is not finite.

        loss: this process's part of the global mean loss; grad_norm: the same on every process.
        """
        ok = torch.isfinite(grad_norm).double()
        loss, grad_norm = (torch.nan_to_num(x.detach().double(), 0.0, 0.0, 0.0) * ok for x in (loss, grad_norm))
        bad_in_row = (self.sums[4] + 1) * (1 - ok)
        self.sums = torch.stack([*(self.sums[:4] + torch.stack([loss, ok, grad_norm, 1 - ok])), bad_in_row])
        return (1 - ok).float()

    def state(self) -> dict[str, float]:
        """The sums over all processes. A collective: every process calls it at the same step."""
        loss = self.sums[:1].clone()
        loss = self.accelerator.reduce(loss, "sum") if self.accelerator.num_processes > 1 else loss
        state = dict(zip(NAMES, [*loss.tolist(), *self.sums[1:].tolist()]))
        self._set(state)
        return state

    def read(self) -> dict[str, float]:
        """Means since the last call, and start again; the row of bad updates goes on. A collective, like `state`."""
        state = self.state()
        self._set({**dict.fromkeys(NAMES, 0.0), "bad_in_row": state["bad_in_row"]})
        steps = max(state["steps"], 1.0)
        return {
            "loss": state["loss"] / steps,
            "grad_norm": state["grad_norm"] / steps,
            "bad_steps": int(state["bad"]),
            "bad_in_row": int(state["bad_in_row"]),
        }
