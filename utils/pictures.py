"""The pictures of each mode of sample_ddpm.py, lazily, as (number of the file, uint8 [C, H, W])."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusions import Batch, GaussianDiffusion, build_process, time_grid
from diffusions.generate import Conditions, Walk, denoiser, guidance_of
from diffusions.inpainting import inpainting
from diffusions.interpolation import interpolated_conditions, interpolation
from diffusions.inversion import encode
from diffusions.noise import randn
from diffusions.pixels import to_unit
from utils import modes, precision
from utils.captions import Asked
from utils.cli import say
from utils.data.conditions import cond_of
from utils.data.image_set import ImageSet
from utils.distributed import main_process_first
from utils.images import grid, strip, upright
from utils.micro_batch import generate_fitting
from utils.process import signal_left
from utils.protocol import sampling_identity
from utils.readers import Reader, check_asked, open_reader
from utils.source import load_mask, load_source
from utils.weights import Weights

Pictures = Iterator[tuple[int, Tensor]]


@dataclass
class Job:
    """What all pictures of a call have in common."""

    process: GaussianDiffusion
    sample: DictConfig  # the config's sample section
    options: argparse.Namespace  # of sample_ddpm.py
    precision: str  # no, bf16 or fp16
    n_frames: int  # per strip, in modes denoise and progressive
    counts: list[int]  # of sampling steps; more than one in mode consistency
    source: ImageSet | None
    hole: Tensor | None  # [H, W] bool
    identity: dict[str, Any]  # what the pictures are a function of
    asked: Asked  # the conditions
    reader: Reader | None  # of texts
    net: nn.Module | None = None

    @classmethod
    def open(
        cls, options: argparse.Namespace, weights: Weights, keys: dict[str, Any], accelerator, asked: Asked
    ) -> Job:
        """Everything but the network; keys: dotted keys given for this call. Raises InputError for wrong options."""
        cfg, extra = weights.config, {}
        reader = open_reader(cfg, accelerator.device)
        check_asked(asked, reader)
        process, precision_name = build_process(cfg.diffusion), precision.mixed_precision(cfg.sample.mixed_precision)
        if warning := signal_left(process):
            say(f"warning: {warning}")
        counts, source, hole = modes.step_counts(options, cfg), None, None
        n_frames = modes.n_frames(options, counts[0])
        if options.mask is not None:
            hole = load_mask(options.mask, cfg.data.image_size)
            mask_sha256 = hashlib.sha256(hole.numpy().tobytes()).hexdigest()
            extra |= {"mask_sha256": mask_sha256, "n_resample": options.n_resample}
        if options.source is not None:
            with main_process_first(accelerator):  # one downloads
                source = load_source(options.source, cfg.data, keys, options.n_samples)
            extra["source_sha256"] = source.content_hash()
        if options.mode == "interpolate":
            extra |= {"n_interpolate": options.n_interpolate, "corners": options.corners}
        if options.seed_to is not None:
            extra["seed_to"] = options.seed_to
        if options.mode == "consistency":
            extra["grids"] = [time_grid(process.alpha_bar, cfg.sample.skip_type, S).t[:-1].tolist() for S in counts]
        if options.guidance_scales:
            extra["guidance_scales"] = options.guidance_scales
        identity = sampling_identity(weights, cfg, process, options.seed, precision_name, asked)
        identity |= {"mode": options.mode, "frames": n_frames} | extra
        return cls(
            process, cfg.sample, options, precision_name, n_frames, counts, source, hole, identity, asked, reader
        )  # fmt: skip

    @property
    def unit(self) -> str:
        if self.options.guidance_scales:
            return "columns"
        return {"sample": "images", "interpolate": "squares" if self.options.corners else "rows"}.get(
            self.options.mode, "strips"
        )

    def describe(self) -> str:
        steps = ", ".join(map(str, self.counts))
        sample = self.sample
        return f"{sample.sampler}, {sample.skip_type} {steps} steps, {self.precision}, seed {self.options.seed}" + (
            self.asked.describe() + self._guidance()
        )

    def _guidance(self) -> str:
        scales = self.options.guidance_scales or [self.sample.guidance_scale] * bool(self.asked.entries)
        return f", guidance {' '.join(f'{scale:g}' for scale in scales)}" if scales else ""

    def images(
        self, indices: list[int], sample: DictConfig | None = None, cond: Conditions | None = None, **more: Any
    ) -> Iterator[Batch]:
        return generate_fitting(
            self.net, self.process, sample or self.sample, indices, self.options.seed, self.options.micro_batch,
            cond=cond or self.cond, dtype=precision.DTYPES[self.precision], **more,
        )  # fmt: skip

    def cond(self, indices: Tensor) -> dict[str, Tensor] | None:
        """The conditions of images."""
        return cond_of(self.asked, self.reader, indices)

    @torch.no_grad()
    def encoded(self, indices: Tensor) -> dict[str, Tensor]:
        """The same as the network reads them."""
        device = next(self.net.parameters()).device
        return self.net.encode(**{name: value.to(device) for name, value in self.cond(indices).items()})

    def real(self, indices: Tensor) -> Tensor:
        """Images of the source, [b, C, H, W] in [-1, 1]."""
        return to_unit(torch.stack([self.source[i] for i in indices.tolist()]))

    def latents(self, denoise, indices: Tensor, grid) -> Tensor:
        """x_T of images: those of the source encoded, or the noise that mode sample starts from."""
        device = next(self.net.parameters()).device
        if self.source is not None and self.asked.entries:  # `denoise` may be of conditions between those of images
            guidance, dtype = guidance_of(self.sample), precision.DTYPES[self.precision]
            cond = self.encoded(indices)
            denoise = denoiser(self.net, self.process, self.sample.clip_denoised, dtype, cond, guidance)
        if self.source is not None:
            return encode(denoise, self.real(indices).to(device), grid)
        shape = (self.net.in_channels, self.net.image_size, self.net.image_size)
        seed, seed_to = self.options.seed, self.options.seed_to
        if seed_to is None:
            return randn(seed, indices, 0, shape, device)
        ends = torch.stack([randn(s, indices // 2, 0, shape, device) for s in (seed, seed_to)])  # of row indices // 2
        return ends[indices % 2, torch.arange(len(indices))]


def samples(job: Job, files: list[int]) -> Pictures:
    if job.options.guidance_scales:
        yield from scales(job, files)
        return
    for batch in job.images(files):
        yield from zip(batch.indices.tolist(), batch.images)


def scales(job: Job, files: list[int]) -> Pictures:
    """Each image under every guidance scale, one below the other."""
    yield from _under_each(job, files, "guidance_scale", job.options.guidance_scales, upright)


def _under_each(job: Job, files: list[int], option: str, values: Sequence[Any], joined) -> Pictures:
    """Each image under every value of a sampling option."""
    for rows in torch.tensor(files, dtype=torch.int64).split(job.options.micro_batch or 64) if files else ():
        columns = []
        for value in values:
            sample = job.sample.copy()
            sample[option] = value
            columns.append(torch.cat([batch.images for batch in job.images(rows.tolist(), sample)]))
        yield from zip(rows.tolist(), map(joined, torch.stack(columns, dim=1)))


def strips(job: Job, files: list[int]) -> Pictures:
    view = "x0" if job.options.mode == "progressive" else "x"
    for batch in job.images(files, n_frames=job.n_frames, view=view):
        yield from zip(batch.indices.tolist(), map(strip, batch.frames))


def interpolations(job: Job, files: list[int]) -> Pictures:
    n, corners = job.options.n_interpolate, job.options.corners
    per_file = n * n if corners else n
    items = [file * per_file + j for file in files for j in range(per_file)]
    cond = interpolated_conditions(job.encoded, n, corners) if job.asked.entries else None
    batches = job.images(items, cond=cond, walk=interpolation(job.latents, n, corners))
    points = (image for batch in batches for image in batch.images)
    for file in files:
        square = torch.stack([next(points) for _ in range(per_file)])
        yield file, grid(square, n, padding=0)


def decoding(job: Job) -> Walk:
    """The walk from the latents of the source's images."""

    def walk(sampler, denoise, indices, steps, draw):
        return sampler(denoise, job.latents(denoise, indices, steps), steps, draw)

    return walk


def reconstructions(job: Job, files: list[int]) -> Pictures:
    for batch in job.images(files, walk=decoding(job)):
        for index, image in zip(batch.indices.tolist(), batch.images):
            yield index, strip(torch.stack([job.source[index], image]))


def inpaintings(job: Job, files: list[int]) -> Pictures:
    walk = inpainting(job.real, job.hole, job.options.n_resample)
    for batch in job.images(files, walk=walk):
        for index, image in zip(batch.indices.tolist(), batch.images):
            known = job.source[index].masked_fill(job.hole, 128)
            yield index, strip(torch.stack([job.source[index], known, image]))


def consistencies(job: Job, files: list[int]) -> Pictures:
    yield from _under_each(job, files, "skip_steps", job.counts, strip)


PICTURES: dict[str, Callable[[Job, list[int]], Pictures]] = {
    "sample": samples,
    "denoise": strips,
    "progressive": strips,
    "interpolate": interpolations,
    "reconstruct": reconstructions,
    "inpaint": inpaintings,
    "consistency": consistencies,
}
