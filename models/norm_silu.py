"""SiLU(GroupNorm(x + emb)) as one operation, by kernels of its own.

cuDNN's convolutions want channels_last; PyTorch's GroupNorm on GPUs copies its input and hands on another layout. The
GPU's kernel takes batches of at least BATCH images, or images of at most PIXELS. On CPUs, PyTorch's takes 1.3 to 25
times as long as the CPU's kernel in bf16 and channels_last (docs/performance.md), which works where there is a compiler
to build it. All else is PyTorch's.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import norm_silu_cpu

BATCH, PIXELS = 64, 1024  # a program per image: with fewer and larger ones, most of the GPU would wait
KERNEL = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if KERNEL:
    from models import norm_silu_kernel  # noqa: F401  registers torch.ops.ddpm.norm_silu


class Norm(nn.GroupNorm):
    """Group normalisation, of x + emb if an embedding is given; then scale and shift, SiLU and dropout, if asked."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor | None = None,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        dropout: nn.Dropout | None = None,
    ) -> Tensor:
        """x [B, C, H, W]; emb, scale, shift [B, C] -> dropout(SiLU(norm(x + emb) (1 + scale) + shift)), x's shape."""
        if norm_silu_cpu.takes(x):
            weight, bias = self.weight, self.bias
            if scale is not None:
                more = 1 + scale.float()
                weight, bias = weight * more, bias * more + shift
            p = dropout.p if dropout is not None and dropout.training else 0.0
            return norm_silu_cpu.norm_silu(x, emb, weight, bias, self.num_groups, self.eps, silu, p)
        if scale is None:
            h = norm_silu(self, x, emb, silu)
        else:
            h = norm_silu(self, x, emb, silu=False) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            h = F.silu(h) if silu else h
        return h if dropout is None else dropout(h)


def norm_silu(norm: nn.GroupNorm, x: Tensor, emb: Tensor | None = None, silu: bool = True) -> Tensor:
    """SiLU(norm(x + emb)), or without the SiLU; `norm` gives the weights, groups and eps."""
    least = 1 if x.shape[2] * x.shape[3] <= PIXELS else BATCH  # images; a process may have none
    if KERNEL and x.is_cuda and x.dtype != torch.float64 and len(x) >= least:
        return torch.ops.ddpm.norm_silu(x, emb, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)[0]
    h = x if emb is None else x + emb[:, :, None, None]
    h = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(h, inplace=not torch.is_grad_enabled()) if silu else h
