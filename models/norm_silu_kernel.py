"""Triton kernels of norm_silu.py: SiLU(GroupNorm(x + emb)) of channels_last tensors, and its gradient.

A program reads one image twice, all channels of some pixels at a time; what it read last often is in the cache still.
The output of the norm is not kept for the backward pass. Sums are in float32 and in a fixed order, so that results
repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ELEMENTS = 8192  # of a tile
CONFIGS = [triton.Config({}, num_warps=8)]


@triton.jit
def _channels(C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """All channels, each group of WIDTH padded to a power of two, as their number G is; and which of them exist."""
    i = tl.arange(0, G * PADDED)
    if PADDED == WIDTH:
        return i, i < C
    return (i // PADDED) * WIDTH + i % PADDED, ((i % PADDED) < WIDTH) & ((i // PADDED) * WIDTH < C)


@triton.jit
def _group_sum(channels, G: tl.constexpr, PADDED: tl.constexpr):
    """[G * PADDED] -> the sum over each group, at each of its channels."""
    groups = tl.sum(tl.reshape(channels, (G, PADDED)), 1)
    return tl.reshape(tl.broadcast_to(groups[:, None], (G, PADDED)), (G * PADDED,))


@triton.jit
def _tile(start, HW, c, exists, C: tl.constexpr, ROWS: tl.constexpr):
    """(offsets, mask) of the pixels start to start + ROWS - 1, all channels."""
    rows = start + tl.arange(0, ROWS)
    return rows[:, None] * C + c[None, :], (rows < HW)[:, None] & exists[None, :]


@triton.autotune(CONFIGS, key=[])
@triton.jit
def _forward(
    x, emb, weight, bias, y, stats, HW, eps, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, EMB: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, and stats [B, 2, C]: at each channel its group's mean without emb, and 1 / standard deviation."""
    image = tl.program_id(0).to(tl.int64)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    y += image * HW * C
    shift = tl.load(x + c, mask=exists, other=0.0).to(tl.float32)  # near the mean: squares around it do not cancel
    total = tl.zeros([ROWS, G * PADDED], tl.float32)
    squares = tl.zeros([ROWS, G * PADDED], tl.float32)
    for start in range(0, HW, ROWS):
        at, inside = _tile(start, HW, c, exists, C, ROWS)
        away = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift[None, :], 0.0)
        total += away
        squares += away * away
    away = tl.sum(total, 0) / HW  # of each channel: its mean - shift, and below the squares around the group's mean
    add = tl.zeros([G * PADDED], tl.float32)
    if EMB:
        add = tl.load(emb + image * C + c, mask=exists, other=0.0).to(tl.float32)
    mean = tl.where(exists, away + shift + add, 0.0)
    centre = _group_sum(mean, G, PADDED) / WIDTH - add
    around = tl.sum(squares, 0) - HW * away * away + HW * (away + shift - centre) * (away + shift - centre)
    rstd = tl.rsqrt(_group_sum(tl.where(exists, tl.maximum(around, 0.0), 0.0), G, PADDED) / (HW * WIDTH) + eps)
    tl.store(stats + image * 2 * C + c, centre, mask=exists)
    tl.store(stats + image * 2 * C + C + c, rstd, mask=exists)

    scale = rstd * tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)
    for start in range(0, HW, ROWS):
        at, inside = _tile(start, HW, c, exists, C, ROWS)
        z = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :] + b[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _slope(x, dy, centre, rstd, weight, bias, SILU: tl.constexpr):
    """(normalised x, gradient at the output of the norm)."""
    normal = (x - centre[None, :]) * rstd[None, :]
    if SILU:
        z = normal * weight[None, :] + bias[None, :]
        s = tl.sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    return normal, dy


@triton.autotune(CONFIGS, key=[])
@triton.jit
def _backward(
    x, weight, bias, stats, dy, dx, sums, HW, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx, and sums [3, B, C]: this image's part of the gradients of weight and bias, and the gradient of emb."""
    image = tl.program_id(0).to(tl.int64)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    dy += image * HW * C
    dx += image * HW * C
    centre = tl.load(stats + image * 2 * C + c, mask=exists, other=0.0)
    rstd = tl.load(stats + image * 2 * C + C + c, mask=exists, other=0.0)
    w = tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, G * PADDED], tl.float32)
    of_bias = tl.zeros([ROWS, G * PADDED], tl.float32)
    for start in range(0, HW, ROWS):
        at, inside = _tile(start, HW, c, exists, C, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normal, dz = _slope(value, slope, centre, rstd, w, b, SILU)
        of_weight += dz * normal
        of_bias += dz
    dweight, dbias = tl.sum(of_weight, 0), tl.sum(of_bias, 0)
    one = tl.num_programs(0).to(tl.int64) * C
    tl.store(sums + image * C + c, dweight, mask=exists)
    tl.store(sums + one + image * C + c, dbias, mask=exists)

    level = _group_sum(dbias * w, G, PADDED) / (HW * WIDTH)
    slant = _group_sum(dweight * w, G, PADDED) / (HW * WIDTH)
    of_emb = tl.zeros([ROWS, G * PADDED], tl.float32)
    for start in range(0, HW, ROWS):
        at, inside = _tile(start, HW, c, exists, C, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normal, dz = _slope(value, slope, centre, rstd, w, b, SILU)
        out = (dz * w[None, :] - level[None, :] - normal * slant[None, :]) * rstd[None, :]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        of_emb += tl.where(inside, out, 0.0)
    tl.store(sums + 2 * one + image * C + c, tl.sum(of_emb, 0), mask=exists)


def _sizes(x: Tensor, groups: int) -> dict[str, int]:
    """The constants of a kernel."""
    channels = x.shape[1]
    width, padded = channels // groups, triton.next_power_of_2(channels // groups)
    groups = triton.next_power_of_2(groups)
    rows = max(1, min(64, ELEMENTS // (groups * padded)))
    return {"C": channels, "G": groups, "WIDTH": width, "PADDED": padded, "ROWS": rows}


@triton_op("ddpm::norm_silu", mutates_args={})
def _norm_silu(
    x: Tensor, emb: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """-> y [B, C, H, W], and stats [B, 2, C] for the backward pass."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    y, stats = torch.empty_like(x), x.new_empty((batch, 2, channels), dtype=torch.float32)
    add = weight if emb is None else emb.contiguous()
    wrap_triton(_forward)[(batch,)](
        x, add, weight, bias, y, stats, pixels, eps, **_sizes(x, groups), EMB=emb is not None, SILU=silu
    )
    return y, stats


@triton_op("ddpm::norm_silu_backward", mutates_args={})
def _norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx [B, C, H, W]; [2, C], the gradients of weight and bias; that of emb, [B, C]."""
    x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    batch, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    dx, sums = torch.empty_like(x), x.new_empty((3, batch, channels), dtype=torch.float32)
    wrap_triton(_backward)[(batch,)](x, weight, bias, stats, dy, dx, sums, pixels, **_sizes(x, groups), SILU=silu)
    return dx, sums[:2].sum(1), sums[2].clone()


def _save(ctx, inputs, output) -> None:
    x, emb, weight, bias, ctx.groups, _, ctx.silu = inputs
    ctx.emb_dtype = None if emb is None else emb.dtype
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx, dy, _):
    x, weight, bias, stats = ctx.saved_tensors
    dx, dparams, demb = torch.ops.ddpm.norm_silu_backward(dy, x, weight, bias, stats, ctx.groups, ctx.silu)
    demb = None if ctx.emb_dtype is None else demb.to(ctx.emb_dtype)
    return dx, demb, dparams[0].to(weight.dtype), dparams[1].to(bias.dtype), None, None, None


_norm_silu.register_autograd(_differentiate, setup_context=_save)
