"""`--micro_batch auto`: as many images at a time as fit. Images do not depend on it, so it may change on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffusions import Batch, generate

MOST = {"cpu": 128, "cuda": 1024}  # images
PIXELS = {"cpu": 2**17, "cuda": 2**22}  # of a batch: large images of a CPU end the process, not with an exception


def generate_fitting(
    model, process, options, indices: list[int], seed: int, micro_batch: int | None, **more
) -> Iterator[Batch]:
    """`generate` with a given micro-batch, or (None) with one that halves whenever the device runs out of memory."""
    if micro_batch is not None:
        yield from generate(model, process, options, indices, seed, micro_batch, **more)
        return
    size, done, cond = first_size(model), 0, more.pop("cond", None)
    while done < len(indices):
        out_of_memory = False
        try:
            rest = {name: rows[done:] for name, rows in cond.items()} if isinstance(cond, dict) else cond
            for batch in generate(model, process, options, indices[done:], seed, size, rest, **more):
                yield batch
                done += len(batch.indices)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            out_of_memory = True
        if out_of_memory:  # only here does nothing hold the failed pass's tensors any more
            torch.cuda.empty_cache()
            size //= 2


def first_size(model) -> int:
    """Images in the first micro-batch that is tried: MOST, or as few as have PIXELS."""
    device = next(model.parameters()).device.type
    kind = device if device in MOST else "cpu"
    return max(1, min(MOST[kind], PIXELS[kind] // model.image_size**2))
