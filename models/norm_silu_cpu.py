"""norm_silu_cpu.cpp, compiled when it is first needed and kept for later starts, as an operation with a gradient.

It takes two seconds, once for each kind of processor, into TORCH_EXTENSIONS_DIR, or else ~/.cache/torch_extensions.
Where there is no compiler (CXX, or else g++), or it fails, a line says so, and PyTorch's own operations do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
SECONDS = 60  # that the compiler may take

SHAPE, DROP = 5 * (ctypes.c_long,), (*3 * (ctypes.c_uint32,), ctypes.c_float)
SWITCHES = 3 * (ctypes.c_int,)
FORWARD = (*6 * (ctypes.c_void_p,), *SHAPE, *DROP, ctypes.c_float, *SWITCHES)
BACKWARD = (*7 * (ctypes.c_void_p,), *SHAPE, *DROP, *SWITCHES)
NO_DROP = (0, 0, 0, 1.0)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled file's functions; None: they can't be had, which is said once."""
    try:
        try:
            built = ctypes.CDLL(str(_built()))
        except OSError:  # a damaged file, or nothing that another try could mend
            built = ctypes.CDLL(str(_built(again=True)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
        reason = said.splitlines()[0]
        print(f"warning: norms are PyTorch's, slower in bf16 (CXX can name a C++ compiler): {reason}", file=sys.stderr)
        return None
    for function, types in ((built.norm_silu, FORWARD), (built.norm_silu_backward, BACKWARD)):
        function.argtypes, function.restype = types, None
    return built


def _built(again: bool = False) -> Path:
    """The compiled file, made if there is none yet, or `again`. Raises OSError, RuntimeError or SubprocessError."""
    compiler = os.environ.get("CXX") or "g++"
    made_of = (compiler, *FLAGS, _processor(), SOURCE.read_text())
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions") / "ddpm"
    built = folder / f"norm_silu-{name}.so"
    if again or not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = Path(scratch, "norm_silu.so")
            words = [*compiler.split(), *FLAGS, "-o", str(new), str(SOURCE)]
            subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)
            new.replace(built)  # at once, whoever else is building it
    return built


def _processor() -> str:
    """What -march=native depends on: a home may be shared by machines of several kinds."""
    try:
        with open("/proc/cpuinfo") as lines:
            first = list(itertools.takewhile(str.strip, lines))  # of many alike
    except OSError:
        return platform.processor()
    return "".join(line for line in first if line.startswith(("model name", "flags", "CPU part", "Features")))


def takes(x: Tensor) -> bool:
    """Whether `norm_silu` is for such an input."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor  # one with memory of its own, as FakeTensors have not
        and not torch._C._are_functorch_transforms_active()
        and len(x) > 0  # a process may have no images
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def norm_silu(
    x: Tensor, emb: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dropout: float = 0
) -> Tensor:
    """x [B, C, H, W], float32 or bfloat16, and emb [B, C] -> SiLU(GroupNorm(x + emb)), in x's type and channels_last.

    weight and bias: [C], or [B, C] where each image has its own. Without `silu` the norm alone. dropout: a probability;
    what is dropped is a function of PyTorch's generator.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    emb = None if emb is None else emb.float().contiguous()
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    drop = _drop(dropout) if dropout else NO_DROP
    if torch.is_grad_enabled():
        return _NormSilu.apply(x, emb, weight, bias, groups, eps, silu, drop)
    return _forward(x, emb, weight, bias, groups, eps, silu, drop, None)


def _drop(dropout: float) -> tuple[int, int, int, float]:
    key = torch.randint(2**32, (2,)).tolist()
    below = round(dropout * 2**32)
    return min(below, 2**32 - 1), *key, 1 / (1 - dropout) if dropout < 1 else 0.0


def _forward(x, emb, weight, bias, groups, eps, silu, drop, stats) -> Tensor:
    y = torch.empty_like(x)
    _call(
        "norm_silu", x.data_ptr(), _pointer(emb), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), _pointer(stats),
        *_shape(x, weight, groups), *drop, eps, silu, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return y


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, emb, weight, bias, groups, eps, silu, drop):
        stats = x.new_empty((len(x), 2, x.shape[1]), dtype=torch.float32)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.groups, ctx.silu, ctx.drop, ctx.emb = groups, silu, drop, emb is not None
        return _forward(x, emb, weight, bias, groups, eps, silu, drop, stats)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("the CPU's norm has second derivatives in float64 only")
        x, weight, bias, stats = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, sums = torch.empty_like(x), x.new_empty((3, len(x), x.shape[1]), dtype=torch.float32)
        _call(
            "norm_silu_backward", dy.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr(), stats.data_ptr(),
            dx.data_ptr(), sums.data_ptr(), *_shape(x, weight, ctx.groups), *ctx.drop, ctx.silu,
            x.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        dweight, dbias = (sums[0], sums[1]) if weight.ndim == 2 else sums[:2].sum(1)
        return dx, sums[2] if ctx.emb else None, dweight, dbias, *4 * (None,)


def _call(name: str, *args) -> None:
    with record_function(f"ddpm::{name}") if torch.autograd._profiler_enabled() else nullcontext():
        getattr(library(), name)(*args)


def _shape(x: Tensor, weight: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    return len(x), x.shape[2] * x.shape[3], x.shape[1], groups, weight.ndim == 2


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
