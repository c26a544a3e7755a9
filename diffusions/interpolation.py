"""Between latents: spherical interpolation of x_T (Song et al. 2021, section 5.3 and appendix D.5)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusions.generate import Walk
from diffusions.samplers import Step


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a, b [B, C, H, W] and weight [B] in [0, 1] -> [B, C, H, W], a where it is 0 and b where it is 1 (eq. 67).

    Nearly parallel ones are mixed linearly.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1)).clamp(min=1e-300)
    angle, weight = torch.acos(cosine.clamp(-1, 1)), weight.double()
    sine = torch.sin(angle)
    parallel = sine < 1e-6
    sine = torch.where(parallel, 1.0, sine)
    of_a = torch.where(parallel, 1 - weight, torch.sin((1 - weight) * angle) / sine)
    of_b = torch.where(parallel, weight, torch.sin(weight * angle) / sine)
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).view_as(a).to(a.dtype)


def interpolation(latents: Callable[..., Tensor], n: int, corners: bool) -> Walk:
    """A walk whose item r n + j is the j-th of n points from latent 2r to latent 2r + 1, both ends included.

    With corners: item r n^2 + i n + j is row i, column j of the square between latents 4r (top left), 4r + 1 (top
    right), 4r + 2 (bottom left) and 4r + 3. latents: (denoise, indices [b], grid) -> x_T [b, C, H, W].
    """

    def walk(sampler, denoise, indices: Tensor, grid, randn) -> Iterator[Step]:
        per_picture, n_ends = (n * n, 4) if corners else (n, 2)
        ends = n_ends * (indices // per_picture)[:, None] + torch.arange(n_ends)  # [b, n_ends]
        needed, places = torch.unique(ends, return_inverse=True)  # an encoded end is encoded once
        x = latents(denoise, needed, grid)
        x = x[places.to(x.device)]  # [b, n_ends, C, H, W]
        across = (indices % n).to(x.device) / (n - 1)
        start = slerp(x[:, 0], x[:, 1], across)
        if corners:
            down = (indices // n % n).to(x.device) / (n - 1)
            start = slerp(start, slerp(x[:, 2], x[:, 3], across), down)
        yield from sampler(denoise, start, grid, randn)

    return walk
