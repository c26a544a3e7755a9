"""From the host to a device without waiting for it."""

import torch
from torch import Tensor


def on(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`. Copies to a GPU go by way of pinned memory: others would wait until its queue is empty."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
