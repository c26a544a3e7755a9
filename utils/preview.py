"""What training shows and checks on the way: previews and the validation loss, with the work split over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusions import GaussianDiffusion, generate
from diffusions.noise import randint, randn
from diffusions.pixels import to_unit
from utils.data.conditions import Conditions
from utils.data.image_set import ImageSet
from utils.distributed import gather_rows, share
from utils.images import grid

SEED = 2022  # of previews and of the validation noise, whatever the run's seed: runs compare on the same draws


def preview(
    accelerator: Accelerator, net: nn.Module, process: GaussianDiffusion, options, n: int,
    cond: Callable[[Tensor], dict[str, Tensor] | None], micro_batch: int, dtype,
) -> Tensor:  # fmt: skip
    """A grid of n generated images, uint8 [C, H, W]: the first n that `sample_ddpm.py --seed 2022` would make.

    cond: indices -> their conditions.
    """
    mine = share(n, accelerator.process_index, accelerator.num_processes)
    batches = generate(net, process, options, mine, SEED, micro_batch, cond(mine), dtype=dtype)
    shape = (0, net.in_channels, net.image_size, net.image_size)
    images = torch.cat([torch.empty(shape, dtype=torch.uint8), *(batch.images for batch in batches)])
    return grid(gather_rows(accelerator, images))


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, net: nn.Module, process: GaussianDiffusion, images: ImageSet,
    conditions: Conditions, batch: int, dtype,
) -> float:  # fmt: skip
    """Mean training loss over a decoded set, each image at one fixed timestep with fixed noise. A collective.

    Dropout is off, of conditions too; the mode of `net` is put back. A compiled network runs as it is written: another
    batch size and mode would be compiled anew.
    """
    training, device = net.training, accelerator.device
    net.eval()
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for rows in share(len(images), accelerator.process_index, accelerator.num_processes).split(batch):
        x0, index = to_unit(images.images[rows].to(device)), rows.to(device)
        t = randint(SEED, index, 1, process.total_steps)
        eps = randn(SEED, index, 0, tuple(x0.shape[1:]), device)
        with (
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            torch.compiler.set_stance("force_eager"),
        ):
            total += process.loss(net, x0, t, eps, **conditions.of(SEED, rows, rows)).double().sum()
    net.train(training)
    return (accelerator.reduce(total, "sum") if accelerator.num_processes > 1 else total).item() / len(images)
