"""Counter-based random numbers: row i of every draw is a function of (seed, index[i], draw) and of nothing else.

So images do not depend on micro-batches, on the number of processes or on interruptions, and training needs no
generator state to resume. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3") in tensor operations: the same bits on every device.
"""

import importlib.util
import math

import torch
from torch import Tensor

from diffusions.transfer import on

KERNEL = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if KERNEL:
    from diffusions.noise_kernel import randn_on_gpu

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Four int64 tensors holding 32-bit words (broadcastable) and two 32-bit keys -> four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, but its 64 bits are right: take them apart by shift and mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, index: Tensor, draw: int, n: int) -> Tensor:
    """[B, n] int64 holding uniform 32-bit words; row i is a function of (seed, index[i], draw).

    Args:
        seed: 0 <= seed < 2^64, the key.
        index: [B] int64 >= 0, which image or training example; its device is that of the result.
        draw: 0 <= draw < 2^32, which draw of that image.
        n: words per row.
    """
    blocks = torch.arange(-(-n // 4), device=index.device)
    low, high = (index & _MASK)[:, None], (index >> 32)[:, None]
    counter = (blocks[None, :], torch.full_like(low, draw), low, high)
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :n]


def randn(seed: int, index: Tensor, draw: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """[B, *shape] float32 standard normal; row i is a function of (seed, index[i], draw).

    Box-Muller in float64, so that rounding to float32 hides the last-bit differences between devices' log, cos and sin.
    Arguments as in `random_words`.
    """
    n, index = math.prod(shape), on(index, device)
    if KERNEL and index.is_cuda:
        return randn_on_gpu(seed, index, draw, n).unflatten(1, tuple(shape))
    words = random_words(seed, index, draw, n + n % 2).double()
    u, v = ((words + 0.5) / 2**32).unflatten(1, (-1, 2)).unbind(-1)  # in (0, 1), never 0
    radius, angle = torch.sqrt(-2 * torch.log(u)), (2 * math.pi) * v
    normal = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normal.flatten(1)[:, :n].float().unflatten(1, tuple(shape))


def randint(seed: int, index: Tensor, draw: int, high: int) -> Tensor:
    """[B] int64 uniform in 0..high-1 (bias below high / 2^32)."""
    return (random_words(seed, index, draw, 1)[:, 0] * high) >> 32


def permutation(seed: int, n: int, draw: int) -> Tensor:
    """A random order of 0..n-1: [n] int64, on the CPU; a function of (seed, n, draw)."""
    words = random_words(seed, torch.arange(n), draw, 2)
    keys = (words[:, 0] << 31) | (words[:, 1] >> 1)  # 63 random bits
    return torch.argsort(keys, stable=True)
