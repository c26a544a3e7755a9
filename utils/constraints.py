"""What must hold between config keys, checked before any work and before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Collection

from omegaconf import DictConfig

from utils.errors import InputError

# What the registry of samplers says, without torch; a test holds the two equal.
TAKES_ETA = ("ddim",)
NEEDS_VARIANCE = ("learned-range",)
STOCHASTIC = ("fixed-large", "fixed-small", "learned-range")

# What a resumed run may change.
MAY_CHANGE = (
    "train.n_steps",
    "train.n_epochs",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
    "train.valid_every",
    "train.evaluate_every",
    "train.save_failure",
    "train.keep_last",
    "train.shard",
    "train.log_with",
    "train.max_hours",
    "train.profile",
    "data.num_workers",
    "data.root",
    "data.download",
)


def check(config: DictConfig, training: bool = True) -> None:
    """Raise InputError for the first combination of keys that can't work; `training` looks at train.* too."""
    check_data(config.data)
    _check_model(config)
    _check_condition(config, training)
    _check_diffusion(config)
    if training:
        _check_train(config)
    _check_sample(config)


def level_sizes(config: DictConfig) -> list[int]:
    """Image size at each level of the U-Net [pixels]; patch_unet halves it before the first."""
    first = 1 if config.model.name == "patch_unet" else 0
    return [config.data.image_size >> first + level for level in range(len(config.model.dim_mults))]


def check_data(data: DictConfig) -> None:
    if data.channels == 2:
        raise InputError("data.channels = 2: wanted 1 (gray) or 3 (RGB)")


def _check_model(config: DictConfig) -> None:
    data, model = config.data, config.model
    if not model.dim_mults or min(model.dim_mults) < 1:
        raise InputError(f"model.dim_mults = {list(model.dim_mults)}: wanted one positive multiple per level")
    halvings = len(model.dim_mults) - 1 + (model.name == "patch_unet")
    factor = 2**halvings
    if data.image_size % factor:
        near = max(factor, round(data.image_size / factor) * factor)
        patches = " and the patches of patch_unet" if model.name == "patch_unet" else ""
        raise InputError(
            f"data.image_size = {data.image_size}: the {len(model.dim_mults)} levels of model.dim_mults{patches} halve "
            f"it {halvings} times, so it must be a multiple of {factor}, such as {near}"
        )
    sizes = level_sizes(config)
    for size in model.attn_resolutions:
        if size not in sizes:
            raise InputError(
                f"model.attn_resolutions = {list(model.attn_resolutions)}: {size} never occurs; "
                f"the levels are {', '.join(map(str, sizes))} pixels"
            )
    widths = sorted({model.dim, *(model.dim * mult for mult in model.dim_mults)})
    if model.dim % 2:
        raise InputError(f"model.dim = {model.dim}: must be even (half sines, half cosines in the time embedding)")
    for width in widths:
        if width % model.norm_groups:
            raise InputError(f"model.norm_groups = {model.norm_groups}: does not divide the width {width}")
    attended = {model.dim * mult for mult, size in zip(model.dim_mults, sizes) if size in model.attn_resolutions}
    for width in sorted(attended | {model.dim * model.dim_mults[-1]}):
        if width % model.n_heads:
            raise InputError(f"model.n_heads = {model.n_heads}: does not divide the attended width {width}")


def _check_condition(config: DictConfig, training: bool) -> None:
    model, sizes = config.model, level_sizes(config)
    for name in ("captions", "captions_held_out"):
        if config.data[name] and model.condition != "text" and training:
            raise InputError(f"data.{name} needs model.condition = text; it is {model.condition}")
    for template in config.data.captions or ():
        if template.count("{}") != 1:
            raise InputError(f"data.captions: {template!r}: wanted one {{}} in it, where the class goes")
    for name in ("classes", "cross_attn_resolutions"):
        if model[name] and model.condition == "none":
            raise InputError(f"model.{name} needs a conditional network; model.condition is none")
    if model.condition == "class" and not training and not model.classes:
        raise InputError("model.condition = class, but model.classes does not name the classes that the weights know")
    if len(set(model.classes)) < len(model.classes):
        raise InputError("model.classes names a class twice")
    if model.condition == "text" and model.text_dim % 32:
        raise InputError(f"model.text_dim = {model.text_dim}: must be a multiple of 32, the width of a head")
    _check_text_encoder(model, training)
    for size in model.cross_attn_resolutions:
        if model.condition != "text":
            raise InputError("model.cross_attn_resolutions: cross-attention reads a text; model.condition is class")
        if size not in sizes:
            raise InputError(
                f"model.cross_attn_resolutions = {list(model.cross_attn_resolutions)}: {size} never occurs; "
                f"the levels are {', '.join(map(str, sizes))} pixels"
            )
        if (width := model.dim * model.dim_mults[sizes.index(size)]) % model.n_heads:
            raise InputError(f"model.n_heads = {model.n_heads}: does not divide the attended width {width}")


def _check_text_encoder(model: DictConfig, training: bool) -> None:
    known = model.text_encoder_width is not None and model.text_encoder_sha256 is not None
    if model.text_encoder is None and (model.text_encoder_width or model.text_encoder_sha256):
        raise InputError("model.text_encoder_width and text_encoder_sha256 belong to a model.text_encoder; it is null")
    if model.text_encoder is None:
        return
    if model.condition != "text":
        raise InputError(f"model.text_encoder needs model.condition = text; it is {model.condition}")
    if not model.text_encoder.strip():
        raise InputError("model.text_encoder is empty: wanted a folder or a name on the Hugging Face hub")
    if not (training or known):
        raise InputError(
            "model.text_encoder: model.text_encoder_width and text_encoder_sha256 do not say which one the weights know"
        )


def has_moved(name: str, old: object, new: object) -> bool:
    """Whether a key that differs says another place for the same thing, whose content is checked when it is read."""
    return name == "model.text_encoder" and None not in (old, new)


def _check_diffusion(config: DictConfig) -> None:
    diffusion = config.diffusion
    if diffusion.beta_schedule in ("linear", "sigmoid", "quad") and diffusion.beta_start > diffusion.beta_end:
        raise InputError(
            f"diffusion.beta_start = {diffusion.beta_start:g} is above diffusion.beta_end = {diffusion.beta_end:g}"
        )
    ends_at_zero = diffusion.zero_terminal_snr or diffusion.beta_schedule == "jsd"
    if ends_at_zero and diffusion.objective == "pred_eps":
        cause = "zero_terminal_snr" if diffusion.zero_terminal_snr else "beta_schedule = jsd"
        raise InputError(
            f"diffusion.{cause} makes alpha_bar_T = 0, where x0 can't be told from eps: "
            "use --diffusion.objective pred_v or pred_x0"
        )
    if ends_at_zero and diffusion.loss_weighting != "none":
        raise InputError(
            f"diffusion.loss_weighting = {diffusion.loss_weighting} gives the last timestep no weight "
            "where alpha_bar_T = 0, so that it is never trained: use none"
        )
    if diffusion.zero_terminal_snr and diffusion.total_steps < 2:
        raise InputError("diffusion.zero_terminal_snr needs diffusion.total_steps >= 2")


def _check_train(config: DictConfig) -> None:
    train = config.train
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise InputError(f"train.betas = {list(train.betas)}: wanted two numbers in [0, 1)")
    if train.condition_dropout > 0 and config.model.condition == "none":
        raise InputError("train.condition_dropout needs a conditional network; model.condition is none")
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if train.shard and (launcher if train.mixed_precision == "auto" else train.mixed_precision) == "fp16":
        raise InputError("train.shard = true goes with mixed_precision bf16 or no: fp16's loss scaler is not supported")
    if train.shard and train.compile == "true":
        raise InputError("train.shard = true and train.compile = true are not supported together: use compile auto")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if train.batch_size % world:
        near = max(1, round(train.batch_size / world)) * world
        raise InputError(
            f"train.batch_size = {train.batch_size} is the global batch and must divide evenly among the {world} "
            f"processes, such as {near}"
        )
    if train.micro_batch is not None and train.micro_batch > train.batch_size:
        raise InputError(f"train.micro_batch = {train.micro_batch} is above train.batch_size = {train.batch_size}")


def _check_sample(config: DictConfig) -> None:
    sample, total = config.sample, config.diffusion.total_steps
    check_steps(sample.skip_steps, total)
    if sample.eta != 0 and sample.sampler not in TAKES_ETA:
        raise InputError(
            f"sample.eta = {sample.eta:g}: the sampler {sample.sampler} ignores eta; "
            f"it belongs to {', '.join(TAKES_ETA)}"
        )
    if sample.sampler in NEEDS_VARIANCE and not config.diffusion.learn_variance:
        raise InputError(
            f"sample.sampler = {sample.sampler}: needs a network that predicts its variance, trained with "
            "diffusion.learn_variance = true; this one has none: use fixed-large or fixed-small"
        )
    check_guidance(config, sample.guidance_scale)


def check_guidance(config: DictConfig, scale: float) -> None:
    """Raise InputError for a guidance that the network can't have, or that says nothing."""
    sample, shown = config.sample, f"sample.guidance_scale = {scale:g}"
    if scale != 1 and config.model.condition == "none":
        raise InputError(f"{shown}: guidance needs a conditional network; model.condition is none")
    if scale != 1 and config.train.condition_dropout == 0:
        raise InputError(
            f"{shown}: guidance needs a network that was trained with train.condition_dropout above 0, "
            "so that it knows what no condition is"
        )
    if sample.guidance_interval is not None:
        interval = list(sample.guidance_interval)
        if len(interval) != 2 or interval[0] > interval[1]:
            raise InputError(f"sample.guidance_interval = {interval}: wanted [lowest, highest] noise level sigma")
        if scale == 0:
            raise InputError(f"{shown} with sample.guidance_interval: nothing would be guided; use a scale above 0")
    if config.model.condition == "none" and (sample.guidance_rescale or sample.guidance_interval is not None):
        raise InputError(
            "sample.guidance_rescale, guidance_interval: need a conditional network; model.condition is none"
        )


def drop_stored_eta(config: DictConfig, asked: Collection[str]) -> None:
    """Set an eta that came with the weights (not `asked`, dotted keys) to 0 for a sampler that ignores it."""
    if config.sample.eta and "sample.eta" not in asked and config.sample.sampler not in TAKES_ETA:
        config.sample.eta = 0.0


def check_steps(skip_steps: int | None, total_steps: int) -> None:
    """Raise InputError unless 1 <= skip_steps <= T."""
    if skip_steps is not None and not 1 <= skip_steps <= total_steps:
        raise InputError(
            f"sample.skip_steps = {skip_steps}: wanted 1 to {total_steps}, the number of training timesteps"
        )
