"""What `auto` means for precision, compilation and determinism: decided by what is asked for and the hardware alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from utils.errors import InputError
from utils.utilisation import network_flops

DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_PAYS = 1e16  # operations: on an H200, 3 minutes eager at the measured 57 TFLOP/s and 35 seconds compiled


def resolve(config: DictConfig, stored: dict[str, Any] | None) -> dict[str, Any]:
    """What `auto` becomes for this run, and put into force; `stored` is what an earlier start of the run decided.

    Returns mixed_precision ("no", "fp16" or "bf16"), compile and deterministic (bool).
    """
    train = config.train
    resolved = stored or {
        "mixed_precision": mixed_precision(train.mixed_precision),
        "compile": not train.shard and wants_compile(train.compile, lambda: training_flops(config)),
        "deterministic": wants_determinism(train.deterministic),
    }
    mixed_precision(resolved["mixed_precision"])  # a run of a GPU may go on where its precision does not exist
    if train.shard:
        resolved = resolved | {"compile": False}
        if resolved["mixed_precision"] == "fp16":
            raise InputError("train.shard = true: this run was started in fp16, whose loss scaler is not supported")
    set_determinism(resolved["deterministic"])
    return resolved


def on_gpu() -> bool:
    """Whether this launch computes on a GPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in (
        "true",
        "1",
        "yes",
    )


def native_bf16() -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if on_gpu():
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def mixed_precision(asked: str) -> str:
    """ "no", "fp16" or "bf16" for a config value; "auto" is the launcher's flag, else bf16 where it is native.

    Raises:
        InputError: fp16 on a CPU, where it would silently be fp32.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "auto":
        asked = launcher if launcher in ("fp16", "bf16") else "bf16" if native_bf16() else "no"
    if asked == "fp16" and not on_gpu():
        raise InputError("fp16 needs a GPU (on a CPU it would silently be fp32): use mixed_precision bf16 or no")
    return asked


def wants_compile(asked: str, flops: Callable[[], float]) -> bool:
    """Whether to compile the network; "auto": on a GPU, where a job of so many operations earns the minute it takes."""
    return on_gpu() and flops() >= COMPILE_PAYS if asked == "auto" else asked == "true"


def training_flops(config: DictConfig) -> float:
    """Operations of a whole training in one process; infinite where its length is not known before the data is."""
    train, config = config.train, config.copy()
    if train.n_epochs is not None:
        return math.inf
    config.model.condition, config.model.cross_attn_resolutions = "none", []  # classes are known with the data
    return 3.0 * network_flops(config) * train.batch_size * train.n_steps / int(os.environ.get("WORLD_SIZE", "1"))


def keep_cast(net: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the convolutions' weights as autocast to `dtype` would cast them anew at every evaluation: same results.

    The network can then no longer be evaluated without autocast. None: nothing is cast.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and dtype is not None:
            module.to(dtype)


def wants_determinism(asked: str) -> bool:
    """ "auto" means yes on a CPU, where it costs nothing."""
    return not on_gpu() if asked == "auto" else asked == "true"


def set_determinism(deterministic: bool, tf32: bool = True) -> None:
    """Make every operation repeat bit for bit, or let the fastest one be chosen; TF32 for float32 products on GPUs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What torch.use_deterministic_algorithms does, without importing the compiler, which compilation.py tells itself
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads such memory
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
