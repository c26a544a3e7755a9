"""What happens when something on the page is pressed: requests started, followed and shown. Imports gradio."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from utils.cli import say
from utils.errors import InputError
from utils.explorer import html
from utils.explorer.drawing import Explorer
from utils.explorer.request import Request
from utils.explorer.results import Panel, Result
from utils.explorer.upload import save_upload
from utils.explorer.watching import Stopped, Work, Works

Start = Callable[[], Callable[[Work], Result]]  # checks a request; raises InputError


class Page:
    """The functions behind the buttons. Visitors are known by gradio's session hash."""

    def __init__(self, explorer: Explorer, works: Works, uploads: Path) -> None:
        self.explorer, self.works, self.uploads = explorer, works, uploads

    def sample(self, visitor: gr.Request, *fields: Any) -> Iterator[tuple]:
        yield from self._follow(visitor, lambda: self.explorer.sample(self._request(*fields)))

    def compare(self, visitor: gr.Request, sampler, skip_type, skip_steps, eta, *fields: Any) -> Iterator[tuple]:
        def start():
            first = self._request(*fields)
            second = replace(first, sampler=sampler, skip_type=skip_type, skip_steps=skip_steps, eta=eta)
            return self.explorer.compare(first, second)

        yield from self._follow(visitor, start)

    def interpolate(self, visitor: gr.Request, seed_to, *fields: Any) -> Iterator[tuple]:
        def start():
            return self.explorer.interpolate(replace(self._request(*fields), seed_to=seed_to))

        yield from self._follow(visitor, start)

    def reconstruct(self, visitor: gr.Request, file, *fields: Any) -> Iterator[tuple]:
        def start():
            data = self.explorer.weights.config.data
            source = save_upload(file, self.uploads, data.channels, data.image_size)
            return self.explorer.reconstruct(replace(self._request(*fields), source=str(source)))

        yield from self._follow(visitor, start)

    def stop(self, visitor: gr.Request) -> None:
        if work := self.works.of(visitor.session_hash):
            work.stop()

    def leave(self, visitor: gr.Request) -> None:
        self.works.leave(visitor.session_hash)

    def point(self, visitor: gr.Request, number: int) -> str:
        """The picture at the slider."""
        work = self.works.of(visitor.session_hash)
        if work is None or work.running:
            return ""
        try:
            points = work.result().points
        except Exception:  # it was stopped or failed, which `_follow` has told
            return ""
        return _point(points, min(max(int(number), 0), len(points) - 1)) if points else ""

    def _request(self, sampler, skip_type, skip_steps, eta, guidance, seed, n_samples, labels, prompts) -> Request:
        return Request(
            sampler, skip_type, skip_steps, float(eta), float(guidance), seed, n_samples, tuple(labels or ()),
            prompts or "",
        )  # fmt: skip

    def _follow(self, visitor: gr.Request, start: Start) -> Iterator[tuple]:
        """Start the work and show it until it ends: values of the outputs, which `build` lists."""
        same, off, idle = gr.skip(), gr.update(visible=False), gr.update(interactive=False, variant="secondary")
        try:
            work = self.works.start(visitor.session_hash, start())
        except InputError as error:
            yield html.wrong(str(error)), *[same] * 8
            return
        except Exception as error:
            yield html.wrong(tell(error)), *[same] * 8
            return
        busy = gr.update(interactive=True, variant="stop")
        yield html.progress(0, "waiting for a free place"), same, *[off] * 6, busy
        stage = "nothing was drawn"
        for seen in work.follow():
            if seen is None:
                continue
            stage = seen.stage
            if not seen.share and work.evaluations:
                stage = f"encoding, {work.evaluations:,} network evaluations"
            text = f"{stage}, {work.seconds:.1f} s"
            yield html.progress(seen.share, text), html.panels(seen.panels), *[same] * 7
        try:
            result = work.result()
        except Stopped:
            yield html.said(f"stopped: {stage}"), *[same] * 7, idle
        except InputError as error:
            yield html.wrong(str(error)), *[same] * 7, idle
        except Exception as error:
            yield html.wrong(tell(error)), *[same] * 7, idle
        else:
            yield (*self._shown(result), idle)

    def _shown(self, result: Result) -> tuple:
        off, outputs = gr.update(visible=False), []
        for made in result.files:
            outputs.append(gr.update(value=str(made.path), label=f"Download {made.name}", visible=True))
            outputs.append(gr.update(value=made.command, label=f"The command that makes it: {made.name}", visible=True))
        outputs += [off] * (4 - len(outputs))
        middle = len(result.points) // 2
        slider = gr.update(value=middle, visible=True) if result.points else off
        point = gr.update(value=_point(result.points, middle), visible=True) if result.points else off
        text = f"done in {result.seconds:.1f} s"
        return html.said(text, result.notes), html.panels(result.panels), *outputs, slider, point


def _point(points: list, i: int) -> str:
    return html.panels([Panel(f"point {i} of 0 to {len(points) - 1}", points[i])])


def tell(error: Exception) -> str:
    """One line for an unexpected error; the traceback goes to the terminal."""
    say("".join(traceback.format_exception(error)))
    return f"internal error, {type(error).__name__}: the terminal that runs explore_ddpm.py shows it"
