"""Processes: starting accelerate, sharing work, and bringing results together."""

from __future__ import annotations

import atexit
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from utils.errors import InputError
from utils.precision import on_gpu


def start(mixed_precision: str = "no", **kwargs: Any) -> Accelerator:
    """An Accelerator for this launch. Raises InputError where the launcher and accelerate disagree about processes."""
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise InputError(
            "the launcher asks for gradient accumulation: leave it at 1 and set --train.micro_batch, "
            "which splits a process's share of train.batch_size"
        )
    for name, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise InputError(
                f"the launcher asks for {engine}, which is not taken from it: launch with distributed_type MULTI_GPU "
                "(configs/launch/one_node.yaml) and set --train.shard true"
            )
    use_all_cores()
    # Of 1x1 convolutions, whose strides along sides of length 1 mean nothing; said twice per process otherwise.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    handlers = [
        InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # ranks may generate for hours between two collectives
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    atexit.register(end)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = world == 1 and not on_gpu()  # otherwise accelerate would take a Mac's GPU, which has no float64
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers, **kwargs)
    if world > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"{world} processes were launched but each believes it is alone, because there is no GPU: "
            "set ACCELERATE_USE_CPU=true to run them on the CPU"
        )
    return accelerator


def end() -> None:
    """Take leave of the other processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """accelerate's, but where the main process fails the others are let go, and meet the same error themselves."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()


def use_all_cores() -> None:
    """Undo the single thread that launchers give each process by default (OMP_NUM_THREADS=1), on a CPU."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and not on_gpu() and os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def share(n: int, rank: int, world: int) -> Tensor:
    """The contiguous part of 0..n-1 that belongs to a rank, [about n / world] int64; together each index once."""
    return torch.arange(rank * n // world, (rank + 1) * n // world)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """Rows [n_r, ...] of every rank, in rank order, on the CPU of every rank; n_r may differ, none is padded."""
    if accelerator.num_processes == 1:
        return rows.cpu()
    parts = gather_object([rows.cpu()])
    return torch.cat([part for part in parts if len(part)] or parts)  # a process without rows knows no width


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process. A collective."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def seed_dropout(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make torch's own generator, which dropout draws from, a function of where training stands."""
    digest = hashlib.blake2b(f"{seed} {step} {rank} {micro_batch}".encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes a millisecond where there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def sync_gradients(accelerator: Accelerator, model: torch.nn.Module, last: bool) -> AbstractContextManager:
    """Gradients are averaged over processes only in the last micro-batch of a step.

    Those of a divided network (utils/sharding.py) in each: between them a process would hold the whole gradient.
    """
    if last or hasattr(model, "set_requires_gradient_sync"):
        return nullcontext()
    return accelerator.no_sync(model)
