"""torch.compile: where its results are kept, and how often it had to compile again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn


def compile_network(net: nn.Module, config: DictConfig) -> None:
    """Compile in place. What comes of it is kept in evaluate.cache_dir, for the next start.

    TORCHINDUCTOR_CACHE_DIR names another folder.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(config.evaluate.cache_dir, "compiled").resolve()))
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # tells the compiler too
    net.compile()


class Recompiles:
    """{"recompiles": graphs made since the first call}, or nothing in a process that compiles none."""

    def __init__(self) -> None:
        self.first: int | None = None

    def __call__(self) -> dict[str, int]:
        dynamo = sys.modules.get("torch._dynamo.utils")
        made = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
        if not made:
            return {}
        self.first = made if self.first is None else self.first
        return {"recompiles": made - self.first}
