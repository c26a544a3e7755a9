"""The normal draws of noise.py as one Triton kernel for GPUs, where they would be about two hundred operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normal_pair(radius_word, angle_word):
    """Box-Muller in float64, as in noise.py."""
    u = (radius_word.to(tl.float64) + 0.5) / 4294967296.0
    angle = 6.283185307179586 * ((angle_word.to(tl.float64) + 0.5) / 4294967296.0)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["draw", "key_0", "key_1"])
def _randn(index, out, n, draw, key_0, key_1, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(index + row)
    zero = block.to(tl.uint32) * 0
    c0, c1 = block.to(tl.uint32), zero + draw.to(tl.uint32)
    c2, c3 = zero + (i & 0xFFFFFFFF).to(tl.uint32), zero + (i >> 32).to(tl.uint32)
    k0, k1 = zero + key_0.to(tl.uint32), zero + key_1.to(tl.uint32)
    m0, m1 = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = tl.umulhi(c2, m1) ^ c1 ^ k0, c2 * m1, tl.umulhi(c0, m0) ^ c3 ^ k1, c0 * m0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    a, b = _normal_pair(c0, c1)
    c, d = _normal_pair(c2, c3)
    out += row * n
    at = block * 4
    tl.store(out + at, a, mask=at < n)
    tl.store(out + at + 1, b, mask=at + 1 < n)
    tl.store(out + at + 2, c, mask=at + 2 < n)
    tl.store(out + at + 3, d, mask=at + 3 < n)


def randn_on_gpu(seed: int, index: Tensor, draw: int, n: int) -> Tensor:
    """[B, n] float32 on the device of index [B] int64; the same draws as noise.randn."""
    out = torch.empty(len(index), n, device=index.device)
    block = 256
    programs = (len(index), triton.cdiv(triton.cdiv(n, 4), block))
    if len(index) and n:
        _randn[programs](index.contiguous(), out, n, draw, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, BLOCK=block)
    return out
