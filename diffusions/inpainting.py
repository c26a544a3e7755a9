"""Filling in the unknown part of an image: RePaint (Lugmayr et al. 2022, algorithm 1)."""

from collections.abc import Callable, Iterator

from torch import Tensor

from diffusions.generate import Walk
from diffusions.samplers import Step


def inpainting(images: Callable[[Tensor], Tensor], unknown: Tensor, n_resample: int) -> Walk:
    """A walk that keeps the known pixels of image i as they are and generates the rest.

    After every step the known region is replaced by the image, noised to the step's end; the step is made n_resample
    times, noising its result back in between, so that both regions come to agree. Every step is a sampler's of its own:
    multistep samplers act at first order. images: indices [b] -> [b, C, H, W] in [-1, 1]; unknown [H, W] bool.
    """

    def walk(sampler, denoise, indices: Tensor, grid, randn) -> Iterator[Step]:
        x = randn()
        image, hole = images(indices).to(x), unknown.to(x.device)
        for step_grid in grid.steps():
            t, _, ab, ab_prev = next(iter(step_grid))
            alpha = ab / ab_prev
            for repeat in range(n_resample if ab_prev < 1 else 1):
                if repeat > 0:
                    x = alpha**0.5 * x + (1 - alpha) ** 0.5 * randn()
                *_, step = sampler(denoise, x, step_grid, randn)
                known = ab_prev**0.5 * image
                if ab_prev < 1:
                    known = known + (1 - ab_prev) ** 0.5 * randn()
                x = step.x.where(hole, known)
            yield Step(t, x, step.x0)

    return walk
