"""Between latents: spherical interpolation of x_T (Song et al. 2021, section 5.3 and appendix D.5); and conditions."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusions.generate import Walk
from diffusions.samplers import Step

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # (a, b [B, ...], weight [B]) -> [B, ...]


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


def lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """a, b [B, ...] and weight [B] in [0, 1] -> [B, ...], exactly a where it is 0 and b where it is 1."""
    return torch.lerp(a, b, weight.to(a.dtype).view(-1, *[1] * (a.dim() - 1)))


def ends_of(indices: Tensor, n: int, corners: bool) -> Tensor:
    """Which images the points `indices` [b] lie between: [b, 2], or [b, 4] with corners (`interpolation`)."""
    per_picture, n_ends = (n * n, 4) if corners else (n, 2)
    return n_ends * (indices // per_picture)[:, None] + torch.arange(n_ends)


def between(mix: Mix, values: Tensor, indices: Tensor, n: int) -> Tensor:
    """The points `indices` [b] between their ends' values [b, 2 or 4, ...] -> [b, ...]."""
    across = (indices % n).to(values.device) / (n - 1)
    found = mix(values[:, 0], values[:, 1], across)
    if values.shape[1] == 4:
        down = (indices // n % n).to(values.device) / (n - 1)
        found = mix(found, mix(values[:, 2], values[:, 3], across), down)
    return found


def interpolation(latents: Callable[..., Tensor], n: int, corners: bool) -> Walk:
    """A walk whose item r n + j is the j-th of n points from latent 2r to latent 2r + 1, both ends included.

    With corners: item r n^2 + i n + j is row i, column j of the square between latents 4r (top left), 4r + 1 (top
    right), 4r + 2 (bottom left) and 4r + 3. latents: (denoise, indices [b], grid) -> x_T [b, C, H, W].
    """

    def walk(sampler, denoise, indices: Tensor, grid, randn) -> Iterator[Step]:
        needed, places = torch.unique(ends_of(indices, n, corners), return_inverse=True)  # encoded once each
        x = latents(denoise, needed, grid)
        start = between(slerp, x[places.to(x.device)], indices, n)
        yield from sampler(denoise, start, grid, randn)

    return walk


def interpolated_conditions(
    encoded: Callable[[Tensor], dict[str, Tensor]], n: int, corners: bool
) -> Callable[[Tensor], dict[str, Tensor]]:
    """The `cond` of the items of `interpolation`: what the network reads of a condition, mixed linearly.

    encoded: images [b] -> their encoded conditions, one row each.
    """

    def cond(indices: Tensor) -> dict[str, Tensor]:
        needed, places = torch.unique(ends_of(indices, n, corners), return_inverse=True)
        found = encoded(needed)
        return {name: between(lerp, value[places.to(value.device)], indices, n) for name, value in found.items()}

    return cond
