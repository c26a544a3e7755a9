"""Triton kernels of norm_silu.py: SiLU(GroupNorm(x + emb)) of channels_last tensors, and its gradient.

Two passes each way: `_moments` and `_sums` read some rows (pixels) of one image with all channels, `_apply` and
`_gradient` bring these parts together and write. The output of the norm is not kept for the backward pass. Sums are in
float32 and in a fixed order, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

ELEMENTS = 4096  # of a tile
PROGRAMS = 1024  # about as many as keep a GPU busy; with fewer images, each is divided among more


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
def _tile(start, stop, c, exists, C: tl.constexpr, ROWS: tl.constexpr):
    """(offsets, mask) of ROWS rows from `start` on."""
    rows = start + tl.arange(0, ROWS)
    return rows[:, None] * C + c[None, :], (rows < stop)[:, None] & exists[None, :]


@triton.jit
def _moments(
    x, parts, HW, share, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """parts [B, splits, 2, C]: the mean of each channel over the rows of a split, and the squares around it."""
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    first, stop = split * share, tl.minimum((split + 1) * share, HW)

    at, inside = _tile(first, stop, c, exists, C, ROWS)
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(tile, 0) / tl.minimum(ROWS, stop - first)  # near the mean, so that squares around it do not cancel
    total = tl.zeros([ROWS, G * PADDED], tl.float32)
    squares = tl.zeros([ROWS, G * PADDED], tl.float32)
    for start in range(first, stop, ROWS):
        at, inside = _tile(start, stop, c, exists, C, ROWS)
        away = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - shift[None, :]
        away = tl.where(inside, away, 0.0)
        total += away
        squares += away * away
    n = (stop - first).to(tl.float32)
    mean = tl.sum(total, 0) / n
    parts += (image * tl.num_programs(1) + split) * 2 * C
    tl.store(parts + c, mean + shift, mask=exists)
    tl.store(parts + C + c, tl.maximum(tl.sum(squares, 0) - n * mean * mean, 0.0), mask=exists)


@triton.jit
def _apply(
    x, emb, weight, bias, parts, y, stats, HW, share, eps, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, EMB: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, and stats [B, 2, C]: at each channel its group's mean without emb, and 1 / standard deviation."""
    image, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    y += image * HW * C
    add = tl.zeros([G * PADDED], tl.float32)
    if EMB:
        add = tl.load(emb + image * C + c, mask=exists, other=0.0).to(tl.float32)

    parts += image * splits * 2 * C
    mean = tl.zeros([G * PADDED], tl.float32)
    for i in range(0, splits):
        rows = tl.minimum(share, HW - i * share).to(tl.float32)
        mean += rows * tl.load(parts + i * 2 * C + c, mask=exists, other=0.0)
    mean = _group_sum(tl.where(exists, mean + HW * add, 0.0), G, PADDED) / (HW * WIDTH)
    centre = mean - add
    squares = tl.zeros([G * PADDED], tl.float32)
    for i in range(0, splits):
        rows = tl.minimum(share, HW - i * share).to(tl.float32)
        away = tl.load(parts + i * 2 * C + c, mask=exists, other=0.0) - centre
        squares += tl.load(parts + i * 2 * C + C + c, mask=exists, other=0.0) + rows * away * away
    rstd = tl.rsqrt(_group_sum(tl.where(exists, squares, 0.0), G, PADDED) / (HW * WIDTH) + eps)
    if split == 0:
        tl.store(stats + image * 2 * C + c, centre, mask=exists)
        tl.store(stats + image * 2 * C + C + c, rstd, mask=exists)

    scale = rstd * tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, HW), ROWS):
        at, inside = _tile(start, tl.minimum((split + 1) * share, HW), c, exists, C, ROWS)
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


@triton.jit
def _sums(
    x, weight, bias, stats, dy, parts, HW, share, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """parts [3, B, splits, C]: over the rows of a split, the sums of dz normal, of dz, and of normal."""
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    dy += image * HW * C
    centre = tl.load(stats + image * 2 * C + c, mask=exists, other=0.0)
    rstd = tl.load(stats + image * 2 * C + C + c, mask=exists, other=0.0)
    w = tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, G * PADDED], tl.float32)
    of_bias = tl.zeros([ROWS, G * PADDED], tl.float32)
    of_normal = tl.zeros([ROWS, G * PADDED], tl.float32)
    stop = tl.minimum((split + 1) * share, HW)
    for start in range(split * share, stop, ROWS):
        at, inside = _tile(start, stop, c, exists, C, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normal, dz = _slope(value, slope, centre, rstd, w, b, SILU)
        of_weight += dz * normal
        of_bias += dz
        of_normal += tl.where(inside, normal, 0.0)
    splits = tl.num_programs(1)
    parts += (image * splits + split) * C
    one = tl.num_programs(0).to(tl.int64) * splits * C
    tl.store(parts + c, tl.sum(of_weight, 0), mask=exists)
    tl.store(parts + one + c, tl.sum(of_bias, 0), mask=exists)
    tl.store(parts + 2 * one + c, tl.sum(of_normal, 0), mask=exists)


@triton.jit
def _gradient(
    x, weight, bias, stats, dy, parts, dx, demb, HW, share, C: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx, and demb [B, C], the sum of dx over the pixels."""
    image, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c, exists = _channels(C, G, WIDTH, PADDED)
    x += image * HW * C
    dy += image * HW * C
    dx += image * HW * C
    centre = tl.load(stats + image * 2 * C + c, mask=exists, other=0.0)
    rstd = tl.load(stats + image * 2 * C + C + c, mask=exists, other=0.0)
    w = tl.load(weight + c, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=exists, other=0.0).to(tl.float32)

    one = tl.num_programs(0).to(tl.int64) * splits * C
    parts += image * splits * C
    of_weight = tl.zeros([G * PADDED], tl.float32)
    of_bias = tl.zeros([G * PADDED], tl.float32)
    of_normal = tl.zeros([G * PADDED], tl.float32)
    for i in range(0, splits):
        of_weight += tl.load(parts + i * C + c, mask=exists, other=0.0)
        of_bias += tl.load(parts + one + i * C + c, mask=exists, other=0.0)
        of_normal += tl.load(parts + 2 * one + i * C + c, mask=exists, other=0.0)
    level = _group_sum(of_bias * w, G, PADDED) / (HW * WIDTH)
    slant = _group_sum(of_weight * w, G, PADDED) / (HW * WIDTH)
    if split == 0:
        tl.store(demb + image * C + c, (of_bias * w - HW * level - of_normal * slant) * rstd, mask=exists)

    stop = tl.minimum((split + 1) * share, HW)
    for start in range(split * share, stop, ROWS):
        at, inside = _tile(start, stop, c, exists, C, ROWS)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normal, dz = _slope(value, slope, centre, rstd, w, b, SILU)
        out = (dz * w[None, :] - level[None, :] - normal * slant[None, :]) * rstd[None, :]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


def _division(x: Tensor, groups: int) -> tuple[tuple[int, int], int, dict[str, int]]:
    """(programs, rows of each, the constants of a kernel): images, and rows of an image, divided among programs."""
    batch, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    width, padded = channels // groups, triton.next_power_of_2(channels // groups)
    groups = triton.next_power_of_2(groups)
    rows = max(ELEMENTS // (groups * padded), 1)
    tiles = triton.cdiv(pixels, rows)
    share = triton.cdiv(tiles, min(tiles, max(PROGRAMS // batch, 1), 128)) * rows
    sizes = {"C": channels, "G": groups, "WIDTH": width, "PADDED": padded, "ROWS": rows}
    return (batch, triton.cdiv(pixels, share)), share, sizes


@triton_op("ddpm::norm_silu", mutates_args={})
def _norm_silu(
    x: Tensor, emb: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """-> y [B, C, H, W], and stats [B, 2, C] for the backward pass."""
    x = x.contiguous(memory_format=torch.channels_last)
    programs, share, sizes = _division(x, groups)
    pixels, (batch, channels) = x.shape[2] * x.shape[3], x.shape[:2]
    parts = x.new_empty((*programs, 2, channels), dtype=torch.float32)
    y, stats = torch.empty_like(x), x.new_empty((batch, 2, channels), dtype=torch.float32)
    wrap_triton(_moments)[programs](x, parts, pixels, share, **sizes)
    add = weight if emb is None else emb.contiguous()
    wrap_triton(_apply)[programs](
        x, add, weight, bias, parts, y, stats, pixels, share, eps, **sizes, EMB=emb is not None, SILU=silu
    )
    return y, stats


@triton_op("ddpm::norm_silu_backward", mutates_args={})
def _norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx [B, C, H, W]; [2, C], the gradients of weight and bias; that of emb, [B, C]."""
    x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    programs, share, sizes = _division(x, groups)
    pixels, (batch, channels) = x.shape[2] * x.shape[3], x.shape[:2]
    parts = x.new_empty((3, *programs, channels), dtype=torch.float32)
    dx, demb = torch.empty_like(x), x.new_empty((batch, channels), dtype=torch.float32)
    wrap_triton(_sums)[programs](x, weight, bias, stats, dy, parts, pixels, share, **sizes, SILU=silu)
    wrap_triton(_gradient)[programs](x, weight, bias, stats, dy, parts, dx, demb, pixels, share, **sizes, SILU=silu)
    return dx, parts[:2].sum((1, 2)), demb


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
