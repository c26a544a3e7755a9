"""Training batches as a function of (seed, step): what resuming, and changing the number of processes, rests on.

The training stream is one endless sequence of examples: epoch after epoch, each in its own random order. The global
batch of step s is examples s*B to (s+1)*B - 1, and a process takes its slice of it. Order and flips are counter-based
noise.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusions.noise import permutation, randint
from diffusions.transfer import on
from utils.data.image_set import ImageSet
from utils.errors import InputError, RankError
from utils.stopping import SIGNALS

# Which draw of a training example is what; sampling uses draws from 0 up with its own seed.
DRAW_EPS, DRAW_T, DRAW_FLIP, DRAW_ORDER = 0, 1, 2, 2**31
CACHE_BYTES = 2**30


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """[n] int64: the order in which the images are seen in an epoch."""
    return permutation(seed, n, DRAW_ORDER + epoch)


def example_images(seed: int, positions: Tensor, n: int) -> Tensor:
    """positions [b] in the endless sequence -> [b] int64, which of the n images stands there."""
    epochs = positions // n
    picked = [epoch_order(seed, e, n)[positions[epochs == e] % n] for e in epochs.unique(sorted=True).tolist()]
    return torch.cat(picked)  # positions ascend, so the epochs do


def flips(seed: int, positions: Tensor) -> Tensor:
    """[b] bool: which examples are mirrored."""
    return randint(seed, positions, DRAW_FLIP, 2).bool()


def draw_timesteps(seed: int, positions: Tensor, total_steps: int, t_sampling: str, device="cpu") -> Tensor:
    """[b] int64 training timesteps on `device`. "antithetic": every second example has T - 1 - t of the one before."""
    if t_sampling == "uniform":
        return on(randint(seed, positions, DRAW_T, total_steps), device)
    t = randint(seed, positions // 2, DRAW_T, total_steps)
    return on(torch.where(positions % 2 == 0, t, total_steps - 1 - t), device)


def held_out(images: ImageSet | None, n: int) -> ImageSet | None:
    """At most n of a set, decoded, evenly spaced over it (so over its classes); None where there is no set."""
    if images is None:
        return None
    rows = torch.arange(min(n, len(images))) * len(images) // min(n, len(images))
    chosen = images.subset(rows, images.name)
    pixels = torch.stack([chosen[i] for i in range(len(chosen))])
    return ImageSet(images.name, pixels, chosen.labels, chosen.classes, chosen.captions)


class Batches:
    """The batches of one process, from any step on.

    Args:
        images: the training images.
        seed: the run's seed.
        batch_size: examples per step over all processes.
        rank, world: which process this is, of how many; world divides batch_size.
        random_flip: mirror half of the examples.
        device: where batches go; cached images live there.
        cache: "true", "false", or "auto": cached when the decoded images are under CACHE_BYTES.
        num_workers: processes that decode images that are not cached.
    """

    def __init__(
        self,
        images: ImageSet,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        random_flip: bool = False,
        device: torch.device | str = "cpu",
        cache: str = "auto",
        num_workers: int = 0,
    ) -> None:
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.rank, self.share = rank, batch_size // world
        self.random_flip, self.device, self.num_workers = random_flip, torch.device(device), num_workers
        cached = cache == "true" or (cache == "auto" and images.n_bytes() <= CACHE_BYTES)
        self.cached = decode_all(images, num_workers).to(self.device) if cached else None

    @classmethod
    def of(cls, config, images: ImageSet, rank: int, world: int, device) -> Batches:
        """As the configuration says."""
        data = config.data
        more = {"random_flip": data.random_flip, "cache": data.cache, "num_workers": data.num_workers}
        return cls(images, config.seed, config.train.batch_size, rank, world, device=device, **more)

    def positions(self, step: int) -> Tensor:
        """[share] int64: this process's examples of the global batch of `step` (0 is the first)."""
        first = step * self.batch_size + self.rank * self.share
        return torch.arange(first, first + self.share)

    def image_ids(self, positions: Tensor) -> Tensor:
        """positions [b], ascending -> which images stand there, [b] int64."""
        return example_images(self.seed, positions, len(self))

    def __len__(self) -> int:
        return len(self.images)

    def from_step(self, step: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions [share] on the host, images uint8 [share, C, H, W] on the device) for steps step..last-1."""
        indices = (self.image_ids(self.positions(s)) for s in range(step, last))
        if self.cached is not None:
            chosen = (self.cached[on(i, self.device)] for i in indices)
        else:
            chosen = (pixels.to(self.device, non_blocking=True) for pixels in self._read(indices))
        for s, pixels in zip(range(step, last), chosen):
            positions = self.positions(s)
            if self.random_flip:
                mirrored = on(flips(self.seed, positions), self.device)[:, None, None, None]
                pixels = torch.where(mirrored, pixels.flip(-1), pixels)
            yield positions, pixels

    def _read(self, indices: Iterator[Tensor]) -> Iterator[Tensor]:
        return _checked(
            DataLoader(
                _Reader(self.images),
                batch_sampler=(i.tolist() for i in indices),
                num_workers=self.num_workers,
                collate_fn=_stack,
                worker_init_fn=_leave_signals_to_the_training,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # its own, or iterating would draw from torch's
            ),
            RankError,  # the unreadable image may be in this process's share alone
        )


class _Reader(torch.utils.data.Dataset):
    """Reads an image, or returns the line that says why it can't: exceptions lose their form between processes."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor | str:
        try:
            return self.images[i]
        except InputError as error:
            return str(error)


def _leave_signals_to_the_training(worker: int) -> None:
    """A signal to the whole group must not end the workers, or the steps up to the save would have no images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)


def _checked(batches, error: type[InputError] = InputError) -> Iterator[Tensor]:
    for batch in batches:
        if isinstance(batch, str):
            raise error(batch)
        yield batch


def decoded(images: ImageSet, num_workers: int = 0) -> Iterator[Tensor]:
    """uint8 [b, C, H, W] batches of the whole set in order, decoded by worker processes where it lies in files."""
    if images.images is not None:
        return iter(images.images.split(64))
    loader = DataLoader(_Reader(images), 64, num_workers=num_workers, collate_fn=_stack, generator=torch.Generator())
    return _checked(loader)


def decode_all(images: ImageSet, num_workers: int = 0) -> Tensor:
    """uint8 [N, C, H, W] of the whole set."""
    return images.images if images.images is not None else torch.cat(list(decoded(images, num_workers)))
