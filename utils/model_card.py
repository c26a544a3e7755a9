"""README.md of an exported checkpoint: data, recipe, training length, scores with protocol, samples, use, limits."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from utils.config import merge, read_yaml
from utils.diffusers_format import SPACINGS
from utils.errors import InputError
from utils.results import Results, markdown, report
from utils.weights import Weights

SAMPLES = "samples.png"
LICENCE = "This card states no licence. Whoever publishes the weights chooses one; that of the data may bind it."
KINDS = {"EMA": "moving average of the weights", "raw": "weights without averaging", "only": "one set of weights"}
FOLDERS = {"image_folder": "a folder of images", "huggingface": "a Hugging Face data set"}


def write_card(to: str, weights: Weights, kinds: Iterable[str], parameters: int, folder: Path) -> None:
    """README.md in an export of format `to`, and the run's preview of these weights as samples.png where there is one.

    kinds: of the weights in the export: "EMA", "raw", "only".
    """
    step = weights.file.parent
    preview = step.parent.parent / "samples" / f"{step.name}.png"
    shown = "EMA" in kinds and weights.sets is None and step.parent.name == "ckpt" and preview.is_file()
    if shown:
        shutil.copyfile(preview, folder / SAMPLES)
    (folder / "README.md").write_text(model_card(to, weights, list(kinds), parameters, shown), encoding="utf-8")


def model_card(to: str, weights: Weights, kinds: list[str], parameters: int, shown: bool) -> str:
    """Markdown with the hub's metadata; `shown`: samples.png lies beside it."""
    config, trained = weights.config, _trained(weights)
    size, conditional = config.data.image_size, config.model.condition
    tags = ["ddpm", "ddim", f"{conditional}-conditional" if conditional != "none" else "unconditional-image-generation"]
    head = ["library_name: diffusers"] * (to == "diffusers")
    head += ["pipeline_tag: unconditional-image-generation"] * (conditional == "none")
    sections = [
        "\n".join(["---", *head, "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# DDPM, {size} x {size} pixels",
        _about(config, conditional, weights),
        _table(_network(config, kinds, parameters)),
        "## Data and training",
        _training(weights, trained),
        *_scores(weights),
        *(_samples(config) if shown else ()),
        "## Use",
        _use(to, weights, kinds),
        *(["## Limits in diffusers", "\n".join(f"- {line}" for line in limits(config))] if to == "diffusers" else ()),
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _plain(value: object) -> str:
    """A text of a configuration as markdown that is no markup, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "|*_`[]\\" else c for c in text)


def _table(pairs: list[tuple[str, object]]) -> str:
    return markdown([["", ""], *([name, str(value)] for name, value in pairs)])


def _about(config: DictConfig, conditional: str, weights: Weights) -> str:
    what = {"none": "Unconditional images", "class": "Images of a class", "text": "Images by a prompt"}[conditional]
    known = weights.sets is None and config.data.name not in FOLDERS
    return f"{what} by denoising diffusion." + (f" Trained on `{config.data.name}`." if known else "")


def _network(config: DictConfig, kinds: list[str], parameters: int) -> list[tuple[str, object]]:
    diffusion, data = config.diffusion, config.data
    zero = ", rescaled to zero terminal SNR" if diffusion.zero_terminal_snr else ""
    objective = {"pred_eps": "the noise", "pred_x0": "x0", "pred_v": "v"}[diffusion.objective]
    learned = " and the variance" if diffusion.learn_variance else ""
    kind = " and ".join(KINDS[kind] for kind in kinds)
    return [
        ("network", f"the U-Net of DDPM, {parameters:,} parameters; {kind}"),
        ("images", f"{data.channels} x {data.image_size} x {data.image_size}, in [-1, 1]"),
        ("diffusion", f"T = {diffusion.total_steps}, {diffusion.beta_schedule} betas{zero}, "
         f"the network predicts {objective}{learned}"),
    ]  # fmt: skip


def _trained(weights: Weights) -> tuple[DictConfig, dict] | None:
    """(configuration, state.json) as a checkpoint of a run holds them; None for weights that stand alone."""
    place = weights.file.parent
    try:
        state = json.loads((place / "state.json").read_text())
        return merge((str(place / "config.yaml"), read_yaml(place / "config.yaml"))), dict(state)
    except (OSError, ValueError, TypeError, InputError):
        return None


def _training(weights: Weights, trained: tuple[DictConfig, dict] | None) -> str:
    if weights.sets is not None:
        return f"Converted from another project's {_plain(weights.file.name)}, which does not say how it was trained."
    config, state = trained or (weights.config, {})
    data, train = config.data, config.train
    if came := state.get("converted_from"):
        of = f"{_plain(came.get('file'))} (SHA-256 {_plain(came.get('sha256'))})"
        return f"Converted from {of} and not trained further; how that was trained is not said."
    step = state.get("step")
    length = [("trained for", f"{step:,} updates, {step * train.batch_size:,} images")] if step is not None else []
    planned = f"{train.n_epochs} epochs" if train.n_epochs is not None else f"{train.n_steps:,} updates"
    clip = "none" if train.clip_grad_norm is None else f"norm {train.clip_grad_norm:g}"
    warmup = f", {train.warmup_steps:,} updates of warm-up" if train.warmup_steps else ""
    precision = (state.get("resolved") or {}).get("mixed_precision", train.mixed_precision)
    held_out = f", {data.valid_fraction:.1%} of the training images held out" if data.valid_fraction else ""
    flipped = ", mirrored at random" if data.random_flip else ""
    rows = [
        ("data", FOLDERS.get(data.name, f"`{data.name}`") + held_out + flipped),
        *length,
        ("recipe", f"{planned} of {train.batch_size} images"),
        ("optimizer", f"Adam, learning rate {train.lr:g} ({train.lr_schedule}{warmup}), betas {list(train.betas)}, "
         f"weight decay {train.weight_decay:g}"),
        ("gradient clipping", clip),
        ("EMA decay", f"{train.ema_decay:g}" + (", warmed up" if train.ema_warmup else "")),
        ("loss", f"weighting {config.diffusion.loss_weighting}, timesteps {config.diffusion.t_sampling}"),
        ("dropout", f"{config.model.dropout:g}"),
        ("precision", {"no": "float32"}.get(precision, precision)),
        ("seed", config.seed),
    ]  # fmt: skip
    if config.model.condition != "none":
        rows.append(("condition", f"{config.model.condition}, dropped with probability {train.condition_dropout:g}"))
        rows += [("classes", ", ".join(map(_plain, config.model.classes)))] if config.model.classes else []
        rows += [("captions", ", ".join(map(_plain, data.captions)))] if data.captions else []
    return _table(rows)


def _scores(weights: Weights) -> list[str]:
    """Tables of the results that lie where scores of these weights go, of the rows that are of these weights."""
    try:
        own = [row for row in Results(weights.scores).rows if _of(row).get("weights_sha256") == weights.sha256()]
        if not own:
            return []
        lines = []
        for row in own:
            source, protocol = _of(row), row["protocol"]
            lines.append(
                f"- {_plain(row['label'])}: {row['n']:,} images in {source.get('precision', 'float32')}; "
                f"reference {_plain(row['reference'])} (SHA-256 {str(protocol['reference_sha256'])[:12]}); features of "
                f"{_plain(row['extractor'] or 'none')} ({str(protocol['extractor_weights_sha256'])[:12]})"
            )
        return ["## Scores", report(own), "Protocol, row by row:", "\n".join(lines)]
    except (InputError, KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return []


def _of(row: dict) -> dict:
    return row["protocol"].get("source", {})


def _samples(config: DictConfig) -> list[str]:
    sample, T = config.sample, config.diffusion.total_steps
    how = f"{sample.sampler}, {sample.skip_steps or T} {sample.skip_type} steps"
    return [
        "## Samples",
        f"![samples]({SAMPLES})",
        f"Not selected: the first images of seed 2022 ({how}, moving average).",
    ]


def _use(to: str, weights: Weights, kinds: list[str]) -> str:
    from utils.export import ALONE

    name = {"diffusers": "PATH", "native": "PATH", "ddim": "PATH/ckpt.pth"}.get(to, f"PATH/{ALONE[kinds[0]]}")
    told = " --labels all" if weights.config.model.classes else " --prompts TEXT"
    told = "" if weights.config.model.condition == "none" else told
    flag = "" if weights.config.sample.sampler != "ddim" or to in ("native", "safetensors") else " --sampler ddim"
    lines = [f"accelerate launch sample_ddpm.py --weights {name} --n_samples 64 --save_dir out/samples{flag}{told}"]
    lines += ["accelerate launch train_ddpm.py -e PATH -r auto"] * (to == "native")
    text = "PATH is the folder of this card.\n\n```\n" + "\n".join(lines) + "\n```"
    return text + (f"\n\n```python\n{_code(weights.config)}\n```" if to == "diffusers" else "")


def _code(config: DictConfig) -> str:
    T = config.diffusion.total_steps
    clipped = ", use_clipped_model_output=True" if config.sample.clip_denoised else ""
    calls = {"DDIMPipeline": f"{config.sample.skip_steps or min(50, T)}{clipped}", "DDPMPipeline": f"{T}"}
    if config.diffusion.learn_variance:
        del calls["DDIMPipeline"]
    return f"from diffusers import {', '.join(calls)}\n\n" + "\n\n".join(
        f'pipe = {pipeline}.from_pretrained("PATH")\nimages = pipe(batch_size=4, num_inference_steps={steps}).images'
        for pipeline, steps in calls.items()
    )


def limits(config: DictConfig) -> list[str]:
    """Where diffusers samples this model otherwise than sample_ddpm.py does, a sentence each."""
    sample, found = config.sample, []
    if config.diffusion.learn_variance:
        found.append("The network predicts its variance too, which DDIMPipeline can't read: use DDPMPipeline.")
    if sample.clip_denoised and not config.diffusion.learn_variance:
        found.append(
            "x0 is clipped at every step; DDIMPipeline derives the noise again from the clipped x0 only with "
            "`use_clipped_model_output=True`."
        )
    if sample.skip_type not in SPACINGS.values():
        found.append(f"diffusers has no {sample.skip_type} time grid: the scheduler's is leading.")
    else:
        found.append("Step counts that do not divide T give diffusers' DDIM other timesteps than the training code's.")
    if sample.sampler == "fixed-large" and sample.skip_type in ("trailing", "linspace"):
        found.append("Fewer than T steps of DDPMPipeline on this grid end with noise, because the last t is above 0.")
    return found
