"""`--weights PATH`: a run folder, a checkpoint folder or a .safetensors file -> configuration and network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from utils.cli import say
from utils.config import KEYS, differences, merge, read_yaml
from utils.errors import InputError

FILES = {True: "ema.safetensors", False: "model.safetensors"}
KINDS = {"ema.safetensors": "EMA", "model.safetensors": "raw"}


@dataclass
class Weights:
    """One set of weights on disk and the configuration that describes it."""

    file: Path
    config: DictConfig

    @property
    def kind(self) -> str:
        return KINDS.get(self.file.name, "only")

    def describe(self) -> str:
        return f"{self.file.parent.name}/{self.file.name} ({self.kind} weights)"


def find(path: str, load_ema: bool | None) -> tuple[Path, Path | None]:
    """(weights file, config.yaml beside it or None). Checkpoint folders are verified before anything is read.

    Raises:
        InputError: nothing usable at `path`; the message says what was found.
    """
    from utils import checkpoint

    place = Path(path)
    if not place.exists():
        raise InputError(f"--weights {path}: no such file or folder")
    if place.is_file():
        if place.suffix != ".safetensors":
            raise InputError(f"--weights {path}: wanted a run folder, a checkpoint folder or a .safetensors file")
        if (place.parent / checkpoint.MANIFEST).exists():
            _verified(place.parent)
            if load_ema is not None and KINDS.get(place.name) not in (None, KINDS[FILES[load_ema]]):
                raise InputError(
                    f"--weights {path} names the {KINDS[place.name]} weights, but --load_ema says otherwise"
                )
        beside = place.parent / "config.yaml"
        if load_ema is not None and place.name not in KINDS:
            say(f"{place.name} has one kind of weights: --load_ema does not apply")
        return place, beside if beside.exists() else None
    if checkpoint.is_checkpoint_name(place) or (place / checkpoint.MANIFEST).exists():
        folder = _verified(place)
    elif (place / "ckpt").is_dir():
        folder, _ = checkpoint.newest(place, say)
        if folder is None:
            raise InputError(f"--weights {path}: the run has no good checkpoint")
    else:
        raise InputError(f"--weights {path}: neither a run folder (with ckpt/) nor a checkpoint folder")
    return folder / FILES[load_ema is not False], folder / "config.yaml"


def _verified(folder: Path) -> Path:
    from utils import checkpoint

    why = checkpoint.problem(folder)
    if why:
        raise InputError(f"checkpoint {folder} can't be used: {why}")
    return folder


def open_weights(path: str, load_ema: bool | None, asked: list[tuple[str, dict[str, Any]]]) -> Weights:
    """Weights and their configuration: the stored one, then what was asked for, except train.* which is ignored.

    Raises:
        InputError: what was asked for contradicts the architecture, the diffusion or the image shape.
    """
    file, stored_path = find(path, load_ema)
    asked = [
        (where, {k: v for k, v in keys.items() if k not in KEYS or not k.startswith("train.")}) for where, keys in asked
    ]
    if stored_path is None:
        if not any(where != "command line" for where, _ in asked):
            raise InputError(f"--weights {path} has no config.yaml beside it: say what it is with -c CONFIG")
        return Weights(file, merge(*asked))
    stored = merge((str(stored_path), read_yaml(stored_path)))
    config = merge(*asked, base=stored)
    for name, (old, new) in differences(stored, config).items():
        if name.startswith(("model.", "diffusion.")) or name in ("data.image_size", "data.channels"):
            raise InputError(f"{name} = {_plain(new)} contradicts the weights in {path}, which have {_plain(old)}")
    return Weights(file, config)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def load_network(weights: Weights, device):
    """The network in eval mode on `device`. Raises InputError where file and architecture differ."""
    from models import build_model
    from utils import checkpoint, precision

    cfg = weights.config
    net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
    checkpoint.load_weights(net, checkpoint.read_weights(weights.file), weights.file)
    net = net.to(device, memory_format=precision.memory_format(cfg))
    if precision.wants_compile(cfg.sample.compile):
        net.compile()
    return net.eval().requires_grad_(False)
