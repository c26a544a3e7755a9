"""The page: fields on the left, what was drawn on the right. The one module that imports gradio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from utils.captions import captions_of, templates
from utils.config import KEYS
from utils.errors import InputError
from utils.explorer import html
from utils.explorer.drawing import Explorer, Result, tell
from utils.explorer.request import MOST_IMAGES, N_POINTS, Request
from utils.explorer.upload import MOST_BYTES, save_upload
from utils.explorer.watching import Stopped, Work, Works

ABOUT_SAMPLERS = "ddim, heun, dpm++2m and unipc need 10 to 50 steps; fixed-large and fixed-small (DDPM) more"
Start = Callable[[], Callable[[Work], Result]]  # checks a request; raises InputError


class Page:
    """What happens when something is pressed. Visitors are known by gradio's session hash."""

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
        points = work.result().points
        i = min(max(int(number), 0), len(points) - 1)
        return html.panels([Shown(f"point {i} of 0 to {len(points) - 1}", points[i])]) if points else ""

    def _request(self, sampler, skip_type, skip_steps, eta, guidance, seed, n_samples, labels, prompts) -> Request:
        return Request(
            sampler, skip_type, skip_steps, float(eta), float(guidance), seed, n_samples, tuple(labels or ()),
            prompts or "",
        )  # fmt: skip

    def _follow(self, visitor: gr.Request, start: Start) -> Iterator[tuple]:
        """Start the work and show it until it ends: values of the outputs, which `build` lists."""
        same, off = gr.skip(), gr.update(visible=False)
        try:
            work = self.works.start(visitor.session_hash, start())
        except InputError as error:
            yield html.wrong(str(error)), same, same, same, same, same, same, same
            return
        except Exception as error:
            yield html.wrong(tell(error)), same, same, same, same, same, same, same
            return
        yield html.progress(0, "waiting for a free place"), same, off, off, off, off, "", gr.update(interactive=True)
        stage = "nothing was drawn"
        for seen in work.follow():
            if seen is None:
                continue
            stage = seen.stage
            if not seen.share and work.evaluations:
                stage = f"encoding, {work.evaluations:,} network evaluations"
            text = f"{stage}, {work.seconds:.1f} s"
            yield html.progress(seen.share, text), html.panels(seen.panels), same, same, same, same, same, same
        idle = gr.update(interactive=False)
        try:
            result = work.result()
        except Stopped:
            yield html.said(f"stopped: {stage}"), same, same, same, same, same, same, idle
        except InputError as error:
            yield html.wrong(str(error)), same, same, same, same, same, same, idle
        except Exception as error:
            yield html.wrong(tell(error)), same, same, same, same, same, same, idle
        else:
            yield (*self._shown(result), idle)

    def _shown(self, result: Result) -> tuple:
        files = [gr.update(value=str(path), label=f"Download: {name}", visible=True) for name, path in result.files]
        files += [gr.update(visible=False)] * (2 - len(files))
        middle = len(result.points) // 2
        slider = gr.update(visible=bool(result.points), value=middle)
        point = html.panels([Shown(f"point {middle}", result.points[middle])]) if result.points else ""
        command = gr.update(value=result.command, visible=True)
        return html.said("done", result.notes), html.panels(result.panels), command, *files, slider, point


class Shown:
    """A panel without a caption."""

    def __init__(self, title: str, picture) -> None:
        self.title, self.picture, self.caption = title, picture, ""


def build(page: Page) -> gr.Blocks:
    """The page of a network."""
    explorer = page.explorer
    config = explorer.weights.config
    data, total = config.data, config.diffusion.total_steps
    colour = "gray" if data.channels == 1 else "RGB"
    about = f"{explorer.weights.describe()}: {data.image_size}x{data.image_size} {colour}, T = {total:,} timesteps"
    with gr.Blocks(title="Diffusion explorer", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"# Diffusion explorer\n`{about}`", elem_id="title")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                fields = _fields(config)
            with gr.Column(scale=2, min_width=420):
                with gr.Tab("Sample", id="sample"):
                    gr.Markdown("Images from noise, and how they come about.")
                    sample = gr.Button("Sample", variant="primary", elem_id="run-sample")
                with gr.Tab("Compare", id="compare"):
                    gr.Markdown(
                        "**A** is what the fields on the left say, **B** what is said here; both start from the same noise."
                    )
                    second = _sampling_fields(config, "B: ", "b-", steps="10")
                    compare = gr.Button("Compare A and B", variant="primary", elem_id="run-compare")
                with gr.Tab("Interpolate", id="interpolate"):
                    gr.Markdown(
                        "From the first image of the seed on the left to that of another seed, through latents between theirs."
                    )
                    seed_to = gr.Textbox("2023", label="Other seed", elem_id="seed-to")
                    interpolate = gr.Button("Interpolate", variant="primary", elem_id="run-interpolate")
                with gr.Tab("Reconstruct", id="reconstruct"):
                    gr.Markdown(
                        "An image of yours is encoded into noise by DDIM, run backwards, and decoded again. Its centre square is "
                        f"resized to {data.image_size}x{data.image_size}; more steps lose less."
                    )
                    file = gr.File(
                        label=f"Image (PNG, JPEG, WebP, BMP; at most {MOST_BYTES >> 20} MB)",
                        elem_id="upload",
                        height=120,
                    )
                    reconstruct = gr.Button("Reconstruct", variant="primary", elem_id="run-reconstruct")
                stop = gr.Button("Stop", variant="stop", interactive=False, size="sm", elem_id="stop")
                status = gr.HTML("", elem_id="status")
                stage = gr.HTML(html.HINT, elem_id="stage")
                slider = gr.Slider(
                    0, N_POINTS - 1, step=1, label="Between the two seeds", visible=False, elem_id="point"
                )
                point = gr.HTML("", elem_id="point-picture")
                with gr.Row():
                    files = [
                        gr.DownloadButton("Download", visible=False, size="sm", elem_id=f"download-{i}") for i in (1, 2)
                    ]
                command = gr.Code(
                    language="shell", label="The command that makes the same, bit for bit", visible=False, interactive=False,
                    wrap_lines=True, show_line_numbers=False, lines=1, buttons=["copy"], elem_id="command",
                )  # fmt: skip
        outputs = [status, stage, command, *files, slider, point, stop]
        running = {
            "outputs": outputs,
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        sample.click(page.sample, fields, **running)
        compare.click(page.compare, [*second, *fields], **running)
        interpolate.click(page.interpolate, [seed_to, *fields], **running)
        reconstruct.click(page.reconstruct, [file, *fields], **running)
        stop.click(page.stop, None, None, **at_once)
        slider.input(page.point, slider, point, **at_once)
        blocks.unload(page.leave)
    return blocks.queue(max_size=64)


def _sampling_fields(config, prefix: str, ids: str, steps: str) -> list:
    """How to sample: sampler, skip type, steps, eta."""
    own, samplers = config.sample, list(KEYS["sample.sampler"].choices)
    if not config.diffusion.learn_variance:
        samplers.remove("learned-range")
    with gr.Row():
        sampler = gr.Dropdown(
            samplers,
            value=own.sampler,
            label=f"{prefix}Sampler",
            elem_id=f"{ids}sampler",
            min_width=130,
            info=None if prefix else ABOUT_SAMPLERS,
        )
        skip_steps = gr.Textbox(
            steps,
            label=f"{prefix}Steps",
            elem_id=f"{ids}steps",
            min_width=90,
            info=None if prefix else f"1 to {config.diffusion.total_steps:,}",
        )
    with gr.Row():
        skip_type = gr.Dropdown(
            list(KEYS["sample.skip_type"].choices),
            value=own.skip_type,
            label=f"{prefix}Skip type",
            elem_id=f"{ids}skip-type",
            min_width=130,
            info=None if prefix else "which timesteps are visited",
        )
        eta = gr.Slider(
            0,
            1,
            own.eta,
            step=0.05,
            label=f"{prefix}eta",
            elem_id=f"{ids}eta",
            min_width=90,
            info=None if prefix else "noise that ddim adds",
        )
    return [sampler, skip_type, skip_steps, eta]


def _fields(config) -> list:
    """The fields of every request, in the order of `Page._request`."""
    steps = config.sample.skip_steps or min(50, config.diffusion.total_steps)
    found = _sampling_fields(config, "", "", str(steps))
    n = 16 if config.data.image_size <= 32 else 4 if config.data.image_size < 128 else 1
    with gr.Row():
        seed = gr.Textbox("2022", label="Seed", elem_id="seed", min_width=130)
        n_samples = gr.Textbox(
            str(n), label="Images", info=None, placeholder=f"1 to {MOST_IMAGES}", elem_id="n-samples", min_width=90
        )
    kind, classes = config.model.condition, list(config.model.classes)
    with gr.Column(visible=kind != "none"):
        labels = gr.Dropdown(
            ["all", *classes], value=["all"] if kind == "class" else [], multiselect=True, label="Classes", elem_id="labels",
            info="one for each image, repeated; none: unconditional", visible=kind == "class",
        )  # fmt: skip
        examples = [captions_of(name, templates(config))[0] for name in classes[:4]]
        prompts = gr.Textbox(
            "\n".join(examples), lines=4, label="Prompts", info="a line for each image, repeated; none: unconditional",
            elem_id="prompts", visible=kind == "text",
        )  # fmt: skip
        guidance = gr.Slider(
            0, 10, config.sample.guidance_scale, step=0.1, label="Guidance", elem_id="guidance",
            info="0 unconditional, 1 conditional, above: stronger",
        )  # fmt: skip
    return [*found, guidance, seed, n_samples, labels, prompts]
