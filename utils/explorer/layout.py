"""Where things stand: fields on the left, tabs and what was drawn on the right. Imports gradio."""

from __future__ import annotations

import gradio as gr

from utils.captions import captions_of, templates
from utils.config import KEYS
from utils.explorer import html
from utils.explorer.page import Page
from utils.explorer.request import MOST_IMAGES, N_POINTS
from utils.explorer.upload import MOST_BYTES

ABOUT_SAMPLERS = "ddim, heun, dpm++2m and unipc need 10 to 50 steps; fixed-large and fixed-small (DDPM) more"


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
                runs = _tabs(page, config)
                outputs = _outputs(page)
        running = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        for button, run, own in runs:
            button.click(run, [*own, *fields], outputs, **running)
        blocks.unload(page.leave)
    return blocks.queue(max_size=64)


def _tabs(page: Page, config) -> list[tuple]:
    """(button, what it runs, the fields it has besides those on the left), for each tab."""
    size = config.data.image_size
    with gr.Tab("Sample"):
        gr.Markdown("Images from noise: the noise on the left, what the network predicts from it on the right.")
        sample = gr.Button("Sample", variant="primary", elem_id="run-sample")
    with gr.Tab("Compare"):
        gr.Markdown("**A** is what the fields on the left say, **B** is said here; both start from the same noise.")
        second = _sampling_fields(config, "B: ", "b-", steps="10")
        compare = gr.Button("Compare A and B", variant="primary", elem_id="run-compare")
    with gr.Tab("Interpolate"):
        gr.Markdown("From the first image of the seed on the left to that of another seed, through latents between.")
        seed_to = gr.Textbox("2023", label="Other seed", elem_id="seed-to")
        interpolate = gr.Button("Interpolate", variant="primary", elem_id="run-interpolate")
    with gr.Tab("Reconstruct"):
        gr.Markdown(
            "DDIM, run backwards, encodes your image into noise, and decodes it again. The centre square is resized to "
            f"{size}x{size}; more steps lose less, and an image unlike the training data loses more."
        )
        limit = f"Image: PNG, JPEG, WebP, BMP; at most {MOST_BYTES >> 20} MB"
        file = gr.File(label=limit, elem_id="upload", height=120)
        reconstruct = gr.Button("Reconstruct", variant="primary", elem_id="run-reconstruct")
    return [
        (sample, page.sample, []),
        (compare, page.compare, second),
        (interpolate, page.interpolate, [seed_to]),
        (reconstruct, page.reconstruct, [file]),
    ]


def _outputs(page: Page) -> list:
    """What `Page._follow` yields values of."""
    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    stop = gr.Button("Stop", interactive=False, size="sm", elem_id="stop")
    stop.click(page.stop, None, None, **at_once)
    status, stage = gr.HTML("", elem_id="status"), gr.HTML(html.HINT, elem_id="stage")
    slider = gr.Slider(0, N_POINTS - 1, step=1, label="Between the two seeds", visible=False, elem_id="point")
    point = gr.HTML("", visible=False, elem_id="point-picture")
    slider.input(page.point, slider, point, **at_once)
    made = []
    for i in (1, 2):
        made.append(gr.DownloadButton("Download", visible=False, size="sm", elem_id=f"download-{i}"))
        made.append(
            gr.Textbox(visible=False, buttons=["copy"], interactive=False, lines=2, max_lines=6, autoscroll=False,
                       elem_id=f"command-{i}", elem_classes="command")
        )  # fmt: skip
    return [status, stage, *made, slider, point, stop]


def _sampling_fields(config, prefix: str, ids: str, steps: str) -> list:
    """How to sample: sampler, skip type, steps, eta."""
    own, samplers = config.sample, list(KEYS["sample.sampler"].choices)
    if not config.diffusion.learn_variance:
        samplers.remove("learned-range")
    about = [None] * 4
    if not prefix:
        about = [
            ABOUT_SAMPLERS,
            "which timesteps",
            f"1 to {config.diffusion.total_steps:,}",
            "noise that ddim adds: 0 none, 1 as DDPM",
        ]
    sampler = gr.Dropdown(
        samplers, value=own.sampler, label=f"{prefix}Sampler", info=about[0], elem_id=f"{ids}sampler", render=False
    )
    if not prefix:
        sampler.render()
    with gr.Row():
        if prefix:
            sampler.render()
        skip_steps = gr.Textbox(steps, label=f"{prefix}Steps", info=about[2], elem_id=f"{ids}steps", min_width=100)
        skip_type = gr.Dropdown(
            list(KEYS["sample.skip_type"].choices), value=own.skip_type, label=f"{prefix}Skip type", info=about[1],
            elem_id=f"{ids}skip-type", min_width=100,
        )  # fmt: skip
    eta = gr.Slider(0, 1, own.eta, step=0.05, label=f"{prefix}eta", info=about[3], elem_id=f"{ids}eta")
    return [sampler, skip_type, skip_steps, eta]


def _fields(config) -> list:
    """The fields of every request, in the order of `Page._request`."""
    steps = config.sample.skip_steps or min(50, config.diffusion.total_steps)
    n = 16 if config.data.image_size <= 32 else 4 if config.data.image_size < 128 else 1
    kind, classes = config.model.condition, list(config.model.classes)
    examples = [captions_of(name, templates(config))[0] for name in classes[:4]]
    with gr.Row():
        n_samples = gr.Textbox(str(n), label="Images", info=f"1 to {MOST_IMAGES}", elem_id="n-samples", min_width=100)
        seed = gr.Textbox("2022", label="Seed", info="of the noise", elem_id="seed", min_width=100)
    with gr.Column(visible=kind != "none"):
        each = "for each image in turn; none: unconditional"
        labels = gr.Dropdown(
            ["all", *classes], value=["all"] if kind == "class" else [], multiselect=True, label="Classes",
            info=f"one {each}", visible=kind == "class", elem_id="labels",
        )  # fmt: skip
        prompts = gr.Textbox(
            "\n".join(examples),
            lines=4,
            label="Prompts",
            info=f"a line {each}",
            visible=kind == "text",
            elem_id="prompts",
        )
        guidance = gr.Slider(
            0, 10, config.sample.guidance_scale, step=0.1, label="Guidance", elem_id="guidance",
            info="0 unconditional, 1 conditional, above: stronger",
        )  # fmt: skip
    return [*_sampling_fields(config, "", "", str(steps)), guidance, seed, n_samples, labels, prompts]


def theme() -> gr.themes.Base:
    """Fonts of the system, and hints that can be read in the light and in the dark."""
    hint, hint_dark = "*neutral_600", "*neutral_300"
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts).set(
        body_text_color_subdued=hint, body_text_color_subdued_dark=hint_dark,
        block_info_text_color=hint, block_info_text_color_dark=hint_dark,
        block_label_text_color=hint, block_label_text_color_dark=hint_dark,
    )  # fmt: skip
