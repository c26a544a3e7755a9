"""SiLU(GroupNorm(x + emb)) as one operation, by a kernel of its own on GPUs.

cuDNN's convolutions want channels_last; PyTorch's GroupNorm on GPUs copies its input and hands on another layout. The
kernel takes batches of at least BATCH images, or images of at most PIXELS; all else, and all on CPUs, is PyTorch's.
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


class Norm(nn.GroupNorm):
    """Group normalisation, of x + emb if an embedding is given, and SiLU after it if asked."""

    def forward(self, x: Tensor, emb: Tensor | None = None, silu: bool = False) -> Tensor:
        """x [B, C, H, W] and emb [B, C] (or None) -> [B, C, H, W]."""
        return norm_silu(self, x, emb, silu)


def norm_silu(norm: nn.GroupNorm, x: Tensor, emb: Tensor | None = None, silu: bool = True) -> Tensor:
    """SiLU(norm(x + emb)), or without the SiLU; `norm` gives the weights, groups and eps."""
    least = 1 if x.shape[2] * x.shape[3] <= PIXELS else BATCH  # images; a process may have none
    if KERNEL and x.is_cuda and x.dtype != torch.float64 and len(x) >= least:
        return torch.ops.ddpm.norm_silu(x, emb, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)[0]
    h = x if emb is None else x + emb[:, :, None, None]
    h = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(h, inplace=not torch.is_grad_enabled()) if silu else h
