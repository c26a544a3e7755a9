"""The configuration: one typed schema, a YAML file, dotted overrides, in that order of precedence.

The dataclasses below are the only place where a default lives. This module imports neither torch nor the registries, so
that `--help` and every configuration error come at once; a test holds the Literals equal to the registries.
"""

from __future__ import annotations

import dataclasses
import io
import re
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config_key import KeyInfo, guess, in_range, key, nearest, scalar, typed
from utils.errors import InputError

Switch = Literal["auto", "true", "false"]
DatasetName = Literal[
    "digits",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "celeba",
    "lsun_bedroom",
    "lsun_church",
    "lsun_cat",
    "ffhq",
    "image_folder",
    "huggingface",
]
ModelName = Literal["unet", "patch_unet"]
BetaSchedule = Literal["linear", "cosine", "sigmoid", "quad", "const", "jsd"]
Objective = Literal["pred_eps", "pred_x0", "pred_v"]
SamplerName = Literal["fixed-large", "fixed-small", "learned-range", "ddim", "heun", "dpm++2m", "unipc"]
SkipType = Literal["uniform", "quad", "trailing", "linspace", "logsnr"]
Precision = Literal["auto", "no", "fp16", "bf16"]
Extractor = Literal["inception-v3-compat", "dataset-classifier", "vgg16", "clip-vit-b-32", "dinov2-vit-b-14"]
Metric = Literal["fid", "isc", "kid", "prc", "condition_accuracy", "bpd"]
Condition = Literal["none", "class", "text"]


@dataclass
class Data:
    name: DatasetName = key("digits", "data set")
    root: str = key("data", "folder (or .zip, .parquet, hub name) that holds the data set, or receives its download")
    image_size: int = key(8, "height and width of the images [pixels]", ge=1)
    channels: int = key(1, "1 (gray) or 3 (RGB); images are converted", ge=1, le=3)
    random_flip: bool = key(False, "mirror each training image left-right with probability 1/2")
    num_workers: int = key(4, "worker processes that decode images when they are not cached", ge=0)
    cache: Switch = key("auto", "hold the decoded data set as uint8 in device memory (auto: when it is under 1 GiB)")
    download: bool = key(True, "download the data set where it is missing and can be had")
    valid_fraction: float = key(0.0, "share of the training images held out; 0: the set's own test split", ge=0, lt=1)
    captions: list[str] | None = key(
        None, "caption templates, {} stands for the class; null: the set's own texts, else just {}; for text"
    )
    captions_held_out: list[str] = key([], "captions never shown in training, to see what it makes of them later")


@dataclass
class Model:
    name: ModelName = key("unet", "network: the paper's, or the same on patches of 2x2 pixels, for short budgets")
    dim: int = key(128, "width of the first level [channels]", ge=1)
    dim_mults: list[int] = key([1, 2, 2, 2], "width of each level as a multiple of dim; each level halves the image")
    attn_resolutions: list[int] = key([16], "image sizes at which residual blocks are followed by attention [pixels]")
    num_res_blocks: int = key(2, "residual blocks per level", ge=1)
    n_heads: int = key(1, "attention heads", ge=1)
    norm_groups: int = key(32, "groups of every group normalisation; must divide every width", ge=1)
    dropout: float = key(0.1, "dropout inside residual blocks", ge=0, lt=1)
    condition: Condition = key("none", "what the network is told besides x_t and t")
    classes: list[str] = key([], "names of the classes; taken from the data set when training starts")
    adaptive_norm: bool = key(False, "the time and class embedding scales and shifts after each norm (AdaGN)")
    cross_attn_resolutions: list[int] = key([], "image sizes with cross-attention to the text; the middle has it too")
    text_dim: int = key(128, "width of the text encoder, a multiple of 32 [channels]", ge=32)
    text_layers: int = key(2, "transformer blocks of the text encoder", ge=1)
    text_length: int = key(
        64, "one more than the bytes of text that are read; tokens, of text_encoder's", ge=2, le=4096
    )
    text_encoder: str | None = key(
        None, "frozen Hugging Face encoder, hub name or folder; null: one over bytes, trained jointly"
    )
    text_encoder_width: int | None = key(None, "of its features [channels]; found when training starts", ge=1)
    text_encoder_sha256: str | None = key(None, "of its weights and vocabulary; found when training starts")


@dataclass
class Diffusion:
    total_steps: int = key(1000, "T, the number of training timesteps", ge=1)
    beta_schedule: BetaSchedule = key("linear", "beta_t over t")
    beta_start: float = key(1e-4, "first beta (linear, sigmoid, quad)", gt=0, lt=1)
    beta_end: float = key(0.02, "last beta (linear, sigmoid, quad, const)", gt=0, lt=1)
    zero_terminal_snr: bool = key(False, "rescale the schedule so that alpha_bar_T = 0; needs pred_v or pred_x0")
    objective: Objective = key("pred_eps", "what the network predicts")
    learn_variance: bool = key(False, "also predict the variance (2C output channels, hybrid loss)")
    loss_weighting: Literal["none", "min_snr", "p2"] = key("none", "weight of each timestep's loss")
    t_sampling: Literal["uniform", "antithetic"] = key("uniform", "how training timesteps are drawn")


@dataclass
class Train:
    n_steps: int = key(800000, "optimizer updates", ge=1)
    n_epochs: int | None = key(None, "passes over the training images; replaces n_steps", ge=1)
    batch_size: int = key(128, "images per optimizer update, over all processes", ge=1)
    micro_batch: int | None = key(None, "images per forward pass of one process; null: its whole share", ge=1)
    lr: float = key(2e-4, "peak learning rate of Adam", gt=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = key("constant", "decay to zero at n_steps, or none")
    warmup_steps: int = key(0, "optimizer updates over which lr rises linearly from 0", ge=0)
    betas: list[float] = key([0.9, 0.999], "Adam's betas")
    weight_decay: float = key(0.0, "decoupled weight decay (AdamW)", ge=0)
    clip_grad_norm: float | None = key(1.0, "largest norm of the whole gradient; null: no clipping", gt=0)
    ema_decay: float = key(0.9999, "decay of the exponential moving average of the weights, per update", ge=0, lt=1)
    ema_warmup: bool = key(True, "decay = min(ema_decay, (1+n)/(10+n)) after n updates")
    mixed_precision: Precision = key("auto", "auto: the launcher's flag, else bf16 where it is native")
    compile: Switch = key("auto", "torch.compile the network (auto: where it is measured to pay)")
    deterministic: Switch = key("auto", "bit-identical resume; auto: true on the CPU")
    shard: bool = key(False, "divide weights, gradients, moments and EMA among the processes (FSDP2)")
    gradient_checkpointing: bool = key(False, "recompute residual blocks in the backward pass to save memory")
    condition_dropout: float = key(
        0.0, "probability of dropping the condition of an example, for guidance; needs model.condition", ge=0, le=1
    )
    log_every: int = key(50, "updates between log lines", ge=1)
    log_with: Literal["tensorboard", "none"] = key("tensorboard", "tracker beside metrics.jsonl")
    save_every: int = key(5000, "updates between checkpoints (one is always made at the end)", ge=1)
    sample_every: int = key(5000, "updates between previews", ge=1)
    valid_every: int = key(5000, "updates between validation losses", ge=1)
    evaluate_every: int | None = key(None, "updates between FIDs with dataset-classifier; null: never", ge=1)
    n_evaluate: int = key(2000, "images generated for such a score", ge=1)
    save_failure: Literal["go_on", "stop"] = key("go_on", "what a checkpoint that can't be written does to the run")
    keep_last: int | None = key(3, "newest checkpoints to keep; null: all", ge=1)
    n_samples: int = key(64, "images in a preview", ge=1)
    n_valid: int = key(2048, "validation images used at most", ge=1)
    max_hours: float | None = key(None, "save and stop after this wall time [hours]", gt=0)
    max_bad_steps: int = key(20, "stop after so many updates in a row with a non-finite gradient", ge=1)
    profile: bool = key(False, "say where the time of a step goes, and write trace.json, a Chrome trace of five steps")


@dataclass
class Sample:
    sampler: SamplerName = key("fixed-large", "reverse process; its variance type")
    skip_type: SkipType = key("uniform", "which S of the T timesteps are visited")
    skip_steps: int | None = key(None, "S, the number of sampling steps; null: all T", ge=1)
    eta: float = key(0.0, "DDIM's eta: 0 deterministic, 1 as noisy as DDPM", ge=0, le=1)
    clip_denoised: bool = key(True, "clip the predicted x0 to [-1, 1] at every step")
    guidance_scale: float = key(1.0, "classifier-free guidance: 0 unconditional, 1 conditional, above: stronger", ge=0)
    guidance_rescale: float = key(0.0, "share by which guided outputs get their own spread back", ge=0, le=1)
    guidance_interval: list[float] | None = key(
        None, "lowest and highest noise level sigma at which guidance acts; null: everywhere", ge=0
    )
    mixed_precision: Precision = key("auto", "precision of the network while sampling (auto: as train's auto)")
    compile: Switch = key("auto", "torch.compile the network while sampling (auto: where it is measured to pay)")


@dataclass
class Evaluate:
    metrics: list[Metric] = key(
        ["fid", "isc", "kid", "prc"], "scores to compute; bpd is of the network on the reference"
    )
    n_samples: int = key(50000, "images to generate, and at most as many real ones for bpd", ge=1)
    feature_extractor: Extractor = key("inception-v3-compat", "network whose features are compared")
    feature_extractor_weights: str | None = key(None, "local weights file of the extractor; null: its own download")
    batch_size: int = key(128, "images per forward pass of the extractor", ge=1)
    kid_subset_size: int = key(1000, "images per KID subset; smaller when there are fewer", ge=2)
    cache_dir: str = key(
        "data/cache", "folder for classifiers, reference features and compiled code, by content hashes"
    )


@dataclass
class Config:
    seed: int = key(0, "seed of initialisation, data order, timesteps, noise and dropout", ge=0, le=2**63 - 1)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    diffusion: Diffusion = field(default_factory=Diffusion)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)


def _walk(cls: type, prefix: str = "") -> dict[str, KeyInfo]:
    hints, found = typing.get_type_hints(cls), {}
    for item in fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= _walk(hints[item.name], f"{prefix}{item.name}.")
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        bounds = {name: item.metadata[name] for name in ("ge", "gt", "le", "lt")}
        found[prefix + item.name] = KeyInfo(prefix + item.name, hints[item.name], default, item.metadata["doc"], bounds)
    return found


KEYS: dict[str, KeyInfo] = _walk(Config)


def _unknown(name: str, value: Any, where: str) -> InputError:
    first = next((known for known in KEYS if known.startswith(name + ".")), None)
    if first:
        return InputError(f"{where}: {name} = {value!r}: {name} is a section: set one of its keys, such as {first}")
    return InputError(f"{where}: unknown key {name}{nearest(name, KEYS) or ' (--help lists all keys)'}")


def set_key(config: DictConfig, name: str, value: Any, where: str) -> None:
    """Put `value` (raw text, or a YAML scalar or list) under the dotted key `name`.

    Raises:
        InputError: unknown key, a value of the wrong type or out of range, an index outside a list.
    """
    base, _, index = name.partition("[")
    if base not in KEYS:
        raise _unknown(base, value, where)
    info = KEYS[base]
    wanted = info.type_name + (f", {info.range_name}" if info.range_name else "")
    wrong = f"{where}: {name} = {value!r}: wanted {wanted}{guess(info, value)}"
    place = base
    if index:
        current = OmegaConf.select(config, base)
        if (
            not info.is_list
            or not index.endswith("]")
            or not re.fullmatch("[0-9]{1,6}", index[:-1])
            or int(index[:-1]) >= len(current or ())
        ):
            have = f"{base} has {len(current or ())} entries" if info.is_list else f"{base} is not a list"
            raise InputError(f"{where}: {name}: no such entry: {have}")
        place = f"{base}.{index[:-1]}"
    try:
        value = scalar(info, value) if index else typed(info, value)
        OmegaConf.update(config, place, value, merge=False)
        result = OmegaConf.select(config, base)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise InputError(wrong + (str(error) if str(error).startswith(";") else "")) from error
    if not in_range(info, result):
        raise InputError(wrong)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The leaves of a YAML file as {dotted key: value}. Raises InputError for a missing or malformed file."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"config file {path} is a folder") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"config file {path} is not valid YAML: {str(error).splitlines()[0]}") from None
    return parse_yaml(text, f"config file {path}")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The leaves of YAML text as {dotted key: value}. Raises InputError, which says `where`, for malformed text."""
    import yaml  # omegaconf's own dependency; only its error type is needed

    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{where} must hold sections (data:, model:, ...), not a list")
    return flatten(OmegaConf.to_container(loaded, resolve=False))


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{'train': {'lr': 1}} -> {'train.lr': 1}; empty sections vanish, lists are leaves."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        is_section = any(known.startswith(dotted + ".") for known in KEYS)
        if isinstance(value, dict) and (is_section or value):
            flat |= flatten(value, dotted + ".")
        elif not (value is None and is_section):
            flat[dotted] = value
    return flat


def merge(*layers: tuple[str, dict[str, Any]], base: DictConfig | None = None) -> DictConfig:
    """Schema defaults (or `base`), then each (where it came from, {dotted key: value}) in turn; typed, unchecked."""
    config = OmegaConf.structured(Config) if base is None else base.copy()
    for where, values in layers:
        for name, value in values.items():
            set_key(config, name, value, where)
    return config


def to_yaml(config: DictConfig) -> str:
    """The whole configuration as YAML, readable by `-c`."""
    return OmegaConf.to_yaml(config)


def differences(old: DictConfig, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of the keys in which two configurations differ."""
    pairs = {name: (OmegaConf.select(old, name), OmegaConf.select(new, name)) for name in KEYS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
