"""Requests drawn by the code of sample_ddpm.py, a step at a time, with everything that can be seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffusions.generate import frame_steps, from_noise, trajectory
from diffusions.interpolation import interpolated_conditions, interpolation
from diffusions.pixels import to_uint8
from utils import precision
from utils.captions import read_conditions
from utils.config import merge
from utils.errors import InputError
from utils.explorer.request import N_FRAMES, Request, animated, check_count, command
from utils.explorer.results import Later, Made, Panel, Result, Seen
from utils.explorer.watching import Watched, Work
from utils.images import file_name, grid, strip, write_png
from utils.overview import overview, write_animation, write_errors
from utils.pictures import Job, decoding
from utils.weights import Weights, load_network


class Explorer:
    """A network on its device, and what can be asked of it. Its methods may be called from many threads at once."""

    def __init__(self, weights: Weights, accelerator, fixed: list[str], sampling) -> None:
        """fixed: arguments that every command has; sampling: the module sample_ddpm."""
        self.weights = weights
        weights.sha256()  # now: its file may be pruned while the page is open
        self.fixed, self.sampling, self.accelerator = fixed, sampling, accelerator
        self.net = load_network(weights, accelerator.device)
        mode = precision.mixed_precision(weights.config.sample.mixed_precision)
        precision.set_determinism(precision.wants_determinism("auto"), tf32=mode != "no")
        self._opening = threading.Lock()

    def open(self, arguments: list[str]) -> tuple[Job, list[str]]:
        """A request's job, and what to say of it. Raises InputError as sample_ddpm.py does on its command line."""
        options, asked = self.sampling.parse([*self.fixed, *arguments])
        check_count(options.n_samples)
        where, given = asked[-1]  # the file of -c is in the weights' configuration already
        given = {name: value for name, value in given.items() if not name.startswith("train.")}
        weights = replace(self.weights, config=merge((where, given), base=self.weights.config))
        keys, notes = self.sampling.settle(options, weights.config, asked)
        conditions = read_conditions(options, weights.config, keys)
        with self._opening:
            return Job.open(options, weights, keys, self.accelerator, conditions), notes

    def _command(self, arguments: list[str]) -> str:
        return command(self.fixed, arguments, Path(self.sampling.__file__))

    def sample(self, request: Request) -> Callable[[Work], Result]:
        """Images, and how they came about. Wrong requests raise InputError here, before the work."""
        arguments = request.arguments()
        job, notes = self.open(arguments)
        S, names = job.counts[0], ("x_t", "predicted x0")
        n_frames = min(N_FRAMES, S)
        moving = animated(arguments, n_frames)
        played, _ = self.open(moving)

        def work(work: Work) -> Result:
            folder, kept = work.folder, frame_steps(S, n_frames)
            images, frames, x0 = self._drawn(job, work, range(job.options.n_samples), kept, names)
            seconds = work.seconds
            png = _overview(job, folder / "images", images)
            strips = _written(folder / "strips", [strip(moments) for moments in frames])
            webp = folder / "animation.webp"
            write_animation(webp, played, strips)
            panels = [
                Panel("images", png[0], _cost(work.evaluations, len(images), seconds)),
                Panel(names[1], _overview(job, folder / "x0", x0)[0]),
            ]
            files = [Made("picture, PNG", png[1], self._command(arguments))]
            files.append(Made("animation, WebP", webp, self._command(moving)))
            return Result(panels, files, work.seconds, notes)

        return work

    def compare(self, first: Request, second: Request) -> Callable[[Work], Result]:
        """Two requests from the same seed, one after the other, so that each has the machine for itself."""
        both = [("A", first.arguments()), ("B", second.arguments())]
        jobs = [(name, *self.open(arguments)) for name, arguments in both]

        def work(work: Work) -> Result:
            folder, panels, files = work.folder, [], []
            for (name, arguments), (_, job, _) in zip(both, jobs):
                title = f"{name}: {job.sample.sampler}, {job.counts[0]} {job.sample.skip_type} steps"
                before, started = work.evaluations, work.seconds
                images, *_ = self._drawn(job, work, range(job.options.n_samples), [], (title,), panels)
                cost = _cost(work.evaluations - before, len(images), work.seconds - started)
                picture, path = _overview(job, folder / name, images)
                panels.append(Panel(title, picture, cost))
                files.append(Made(f"{name}, PNG", path, self._command(arguments)))
            notes = list(dict.fromkeys(note for *_, told in jobs for note in told))
            return Result(panels, files, work.seconds, notes)

        return work

    def interpolate(self, request: Request) -> Callable[[Work], Result]:
        """Points between the first image of one seed and that of another."""
        request = replace(request, mode="interpolate", n_samples="2").deterministic(self.weights.config.sample)
        arguments = request.arguments()
        job, notes = self.open(arguments)
        n = job.options.n_interpolate

        def cond(job: Job):
            return interpolated_conditions(job.encoded, n, False) if job.asked.entries else job.cond

        def work(work: Work) -> Result:
            title, walk = "from one seed to the other", lambda job: interpolation(job.latents, n, False)
            images, *_ = self._drawn(job, work, range(n), [], (title,), walk=walk, cond=cond, columns=n)
            cost = _cost(work.evaluations, n, work.seconds)
            picture, path = _overview(job, work.folder / "row", [grid(images, n, padding=0)])
            panels = [Panel(f"{n} points from seed {job.options.seed} to seed {job.options.seed_to}", picture, cost)]
            return Result(panels, [Made("row, PNG", path, self._command(arguments))], work.seconds, notes, list(images))

        return work

    def reconstruct(self, request: Request) -> Callable[[Work], Result]:
        """An image encoded into the x_T that decodes to it, and decoded again."""
        request = replace(request, mode="reconstruct", n_samples="1").deterministic(self.weights.config.sample)
        arguments = request.arguments()
        job, notes = self.open(arguments)

        def work(work: Work) -> Result:
            titles = ("x_t: decoded from its latent", "predicted x0")
            given = [Panel("the image, as the network sees it", job.source[0])]
            images, *_ = self._drawn(job, work, range(1), [], titles, given, walk=decoding)
            cost, folder = _cost(work.evaluations, 1, work.seconds), work.folder
            _, path = _overview(job, folder / "pair", [strip(torch.stack([job.source[0], images[0]]))])
            error = write_errors(folder / "errors.csv", [folder / "pair" / file_name(0)])
            decoded = Panel(
                "decoded from its latent", images[0], f"mean squared error {error:.1e}, pixels in [0, 1]; {cost}"
            )
            files = [Made("both, PNG", path, self._command(arguments))]
            return Result([*given, decoded], files, work.seconds, notes)

        return work

    def _drawn(
        self, job: Job, work: Work, indices: range, kept: list[int], titles: tuple[str, ...],
        beside: list[Panel] | tuple = (), walk=lambda job: from_noise, cond=lambda job: job.cond,
        columns: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """(images [n, C, H, W], frames [n, F, C, H, W] at the steps `kept`, the last predictions of x0), all uint8.

        titles: of x_t and, where there are two, of x0. beside: panels that are there already.
        """
        job = replace(job, net=Watched(self.net, work))
        rows, S, frames = torch.tensor(list(indices)), job.counts[0], []
        work.show(Seen([*beside], "starting", 0.0))
        steps = trajectory(
            job.net, job.process, job.sample, rows, job.options.seed, cond(job)(rows),
            precision.DTYPES[job.precision], walk(job),
        )  # fmt: skip
        try:
            for i, step in enumerate(steps):
                if i in kept:
                    frames.append(to_uint8(step.x).cpu())
                shown = [Panel(title, Later(value, columns)) for title, value in zip(titles, (step.x, step.x0))]
                work.show(Seen([*beside, *shown], f"step {i + 1} of {S}, t = {step.t}", (i + 1) / S))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise InputError(f"--n_samples {len(indices)}: too many for the device's memory: ask for fewer") from None
        work.check()
        moments = torch.stack(frames, dim=1) if frames else None
        return to_uint8(step.x).cpu(), moments, to_uint8(step.x0).cpu()


def _written(folder: Path, pictures) -> list[Path]:
    folder.mkdir()
    paths = [folder / file_name(i) for i in range(len(pictures))]
    for path, picture in zip(paths, pictures):
        write_png(path, picture)
    return paths


def _overview(job: Job, folder: Path, pictures) -> tuple[Tensor, Path]:
    """(what sample_ddpm.py writes as SAVE_DIR-grid.png, where it lies); the pictures themselves in `folder`."""
    picture, path = overview(job, _written(folder, pictures)), folder.with_name(f"{folder.name}-grid.png")
    write_png(path, picture)
    return picture, path


def _cost(evaluations: int, n: int, seconds: float) -> str:
    return f"{seconds:.2f} s, {evaluations // n:,} network evaluations per image"
