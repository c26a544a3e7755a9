"""`--micro_batch auto`: as many images at a time as fit. Images do not depend on it, so it may change on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffusions import Batch, generate

FIRST = {"cpu": 128, "cuda": 1024}


def generate_fitting(
    model, process, options, indices: list[int], seed: int, micro_batch: int | None, **more
) -> Iterator[Batch]:
    """`generate` with a given micro-batch, or (None) with one that halves whenever the device runs out of memory."""
    if micro_batch is not None:
        yield from generate(model, process, options, indices, seed, micro_batch, **more)
        return
    size = FIRST.get(next(model.parameters()).device.type, 128)
    done = 0
    while done < len(indices):
        try:
            for batch in generate(model, process, options, indices[done:], seed, size, **more):
                yield batch
                done += len(batch.indices)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            size //= 2
