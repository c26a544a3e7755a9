"""Weights in the four formats of convert_ddpm.py, each a folder that appears whole or not at all.

Written without diffusers: its folders are JSON and safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from utils import ddim_format, diffusers_format
from utils.config import to_yaml
from utils.errors import InputError, SaveFailed
from utils.model_card import limits, write_card
from utils.weights import FILES, Weights

ALONE = {**FILES, "only": "weights.safetensors"}  # kind -> name of a file that stands alone


def check_free(out: str) -> Path:
    """The folder to write. Raises InputError unless it is new or empty."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out} is a file: wanted a folder that is new or empty")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {out} already holds files: choose a folder that is new or empty")
    return folder.resolve()


def check(to: str, config: DictConfig) -> None:
    """Raise InputError for what the format can't hold; everything is named."""
    if to == "diffusers":
        diffusers_format.unet_json(config)
    elif to == "ddim":
        ddim_format.check(config)


def write(to: str, weights: Weights, load_ema: bool | None, out: Path) -> None:
    """Write `out`: both kinds of weights where the format has both and the source too, unless one was asked for.

    Raises:
        InputError: the weights do not fit their configuration, or are not finite.
        SaveFailed: a full disk, a folder that can't be written; nothing is left behind.
    """
    sets = {kind: weights.tensors(kind) for kind in _kinds(to, weights, load_ema)}
    for kind, state in sets.items():
        _check_weights(weights, kind, state)
    staging = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        FORMATS[to](weights, sets, staging)
        write_card(to, weights, sets, sum(value.numel() for value in next(iter(sets.values())).values()), staging)
        os.chmod(staging, 0o755)
        os.rename(staging, out)  # takes the place of an empty folder, and of nothing else
    except OSError as error:
        raise SaveFailed(f"{out} could not be written: {error.strerror or error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _kinds(to: str, weights: Weights, load_ema: bool | None) -> list[str]:
    return weights.kinds() if load_ema is None and to in ("native", "ddim") else [weights.kind]


def _check_weights(weights: Weights, kind: str, state: dict) -> None:
    import torch

    from models import build_model
    from models.pretrained import differences

    config = weights.config
    with torch.device("meta"):
        net = build_model(config.model, config.data.image_size, config.data.channels, config.diffusion.learn_variance)
    shapes = [{name: list(value.shape) for name, value in tensors.items()} for tensors in (net.state_dict(), state)]
    if differ := differences(*shapes):
        raise InputError(f"{weights.file} holds weights of another architecture: {differ}")
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"the {kind} weights in {weights.file} are not finite ({broken[0]}): nothing was written")


def _native(weights: Weights, sets: dict, folder: Path) -> None:
    """A run folder whose only checkpoint is step 0: training goes on from it with an optimizer that starts afresh."""
    from models import build_model
    from utils.checkpoint import publish
    from utils.optimizer import build_ema, build_optimizer

    config = weights.config
    net = build_model(config.model, config.data.image_size, config.data.channels, config.diffusion.learn_variance)
    ema = build_ema(net, config.train)
    raw, averaged = _pair(sets)
    state = {
        "step": 0,
        "ema": {"step": int(ema.step), "initted": bool(ema.initted)},
        "scaler": None,
        "converted_from": {"file": weights.file.name, "sha256": weights.sha256(), "kinds": list(sets)},
    }
    optimizer = build_optimizer(net, config.train).state_dict()
    publish(folder / "ckpt", 0, to_yaml(config), raw, averaged, optimizer, state)
    (folder / "config.yaml").write_text(to_yaml(config))


def _diffusers(weights: Weights, sets: dict, folder: Path) -> None:
    from models.pretrained import to_diffusers

    config = weights.config
    parts = {
        "unet/config.json": diffusers_format.unet_json(config),
        "scheduler/scheduler_config.json": diffusers_format.scheduler_json(config),
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (state,) = sets.values()
    _save(to_diffusers(state), folder / "unet" / "diffusion_pytorch_model.safetensors", {})


def _ddim(weights: Weights, sets: dict, folder: Path) -> None:
    import torch

    torch.save(ddim_format.states(*_pair(sets), weights.config), folder / "ckpt.pth")
    (folder / "config.yml").write_text(ddim_format.config_yml(weights.config))


def _safetensors(weights: Weights, sets: dict, folder: Path) -> None:
    from utils.checkpoint import CONFIG, KIND

    ((kind, state),) = sets.items()
    _save(state, folder / ALONE[kind], {CONFIG: to_yaml(weights.config), KIND: kind})


FORMATS: dict[str, Callable[[Weights, dict, Path], None]] = {
    "native": _native,
    "diffusers": _diffusers,
    "ddim": _ddim,
    "safetensors": _safetensors,
}


def told(to: str, weights: Weights, load_ema: bool | None, out: Path) -> list[str]:
    """What was written, what it can be used for and what not: lines for a person."""
    kinds = " and ".join(_kinds(to, weights, load_ema))
    lines = [f"{out}: {to}, {kinds} weights of {weights.origin}/{weights.file.name}"]
    if to == "native":
        lines.append(f"training can start from it, at step 0 with a new optimizer: train_ddpm.py -e {out} -r auto")
        lines.append(f"its data set will be {weights.config.data.name}; data.* and train.* are chosen when converting")
    elif to == "diffusers":
        lines += limits(weights.config)
    elif to == "ddim":
        lines.append("put ckpt.pth into EXP/logs/DOC/ and config.yml into configs/; their training starts at step 0")
    return lines


def _pair(sets: dict) -> tuple[dict, dict]:
    """(raw, EMA) weights; where there is one kind it is both."""
    one = next(iter(sets.values()))
    return sets.get("raw", one), sets.get("EMA", one)


def _save(state: dict, path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.contiguous() for name, value in state.items()}, path, {"format": "pt", **metadata})
    except SafetensorError as error:  # how it names a full disk
        raise OSError(str(error)) from error
