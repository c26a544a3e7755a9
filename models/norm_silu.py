"""SiLU(GroupNorm(x + emb)) as one operation, by a kernel of its own on GPUs.

cuDNN's convolutions want channels_last; PyTorch's GroupNorm on GPUs copies its input and hands on another layout.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, PIXELS = 64, 1024  # a program per image: with fewer and larger ones, most of the GPU would wait
KERNEL = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if KERNEL:
    from models import norm_silu_kernel  # noqa: F401  registers torch.ops.ddpm.norm_silu


def norm_silu(norm: nn.GroupNorm, x: Tensor, emb: Tensor | None = None, silu: bool = True) -> Tensor:
    """x [B, C, H, W] and emb [B, C] (or None) -> SiLU(norm(x + emb)), or without the SiLU, in the precision of x."""
    if KERNEL and x.is_cuda and x.dtype != torch.float64 and (len(x) >= BATCH or x[0, 0].numel() <= PIXELS):
        return torch.ops.ddpm.norm_silu(x, emb, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)[0]
    h = norm(x if emb is None else x + emb[:, :, None, None])
    return F.silu(h, inplace=not torch.is_grad_enabled()) if silu else h
