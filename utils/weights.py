"""`--weights PATH`: a run folder, a checkpoint, a file, another project's checkpoint -> configuration and network."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from utils.cli import say
from utils.config import KEYS, differences, merge, parse_yaml, read_yaml
from utils.constraints import has_moved
from utils.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from utils.foreign import Foreign

FILES = {"EMA": "ema.safetensors", "raw": "model.safetensors"}
KINDS = {name: kind for kind, name in FILES.items()}
ALIKE = ("model.dropout",)  # leaves no trace in another project's weights
Layer = tuple[str, dict[str, Any]]  # where keys came from, {dotted key: value}


@dataclass
class Weights:
    """One set of weights on disk and the configuration that describes it."""

    file: Path
    config: DictConfig
    kind: str  # "EMA", "raw" or "only"
    origin: str  # what tables call it: the checkpoint's step, the folder, the hub's id
    scores: Path  # where scores of it go when nothing is said
    sets: dict[str, dict[str, Tensor]] | None = None  # of another project's file: each kind, read already
    digest: str | None = None  # of the file, from the first `sha256` on

    def describe(self) -> str:
        return f"{self.origin}/{self.file.name} ({self.kind} weights)"

    def sha256(self) -> str:
        """Of the file, as it was when first asked; where that holds several kinds, the one in use follows."""
        from utils.checkpoint import sha256

        self.digest = self.digest or sha256(self.file)
        return self.digest + (f" {self.kind}" if self.sets and len(self.sets) > 1 else "")

    def kinds(self) -> list[str]:
        """What there is beside each other: EMA and raw, or the one kind in use."""
        if self.sets is not None:
            return list(self.sets)
        from utils.checkpoint import MANIFEST

        both = self.file.name in KINDS and (self.file.parent / MANIFEST).exists()
        return list(FILES) if both else [self.kind]

    def tensors(self, kind: str | None = None) -> dict[str, Tensor]:
        """The weights in use, or those of another of the `kinds`, under the network's names."""
        from utils.checkpoint import read_weights

        kind = kind or self.kind
        if self.sets is not None:
            return self.sets[kind]
        return read_weights(self.file if kind == self.kind else self.file.with_name(FILES[kind]))


def open_weights(path: str, load_ema: bool | None, asked: list[Layer], training: bool = False) -> Weights:
    """Weights and their configuration: the stored one, then what was asked for; train.* only where `training` follows.

    Raises:
        InputError: nothing usable at `path`, or what was asked for contradicts the architecture, the diffusion or the
            image shape.
    """
    from utils import foreign, hub

    if not training:
        ignored = {name for name in KEYS if name.startswith("train.")}
        asked = [(where, {k: v for k, v in keys.items() if k not in ignored}) for where, keys in asked]
    place, model_id = Path(path), None
    if not place.exists() and hub.is_id(path):
        place, model_id = hub.fetch(path), path
    if not place.exists():
        raise InputError(f"--weights {path}: no such file or folder")
    found = _find_file(place, load_ema) if place.is_file() else _find_folder(place, load_ema)
    if found is None:
        typed = merge(*asked)
        given = {name: _plain(OmegaConf.select(typed, name)) for _, keys in asked for name in keys if name in KEYS}
        return _open_foreign(foreign.read(place, given), place, model_id, load_ema, asked)
    file, layer, kind = found
    stored = merge(layer)
    config = merge(*asked, base=stored)
    _check_same(path, stored, config, KEYS)
    step = file.parent
    scores = step.parent.parent / "scores" / step.name if step.parent.name == "ckpt" else step / "scores"
    return Weights(file, config, kind, step.name, scores)


def _find_file(file: Path, load_ema: bool | None) -> tuple[Path, Layer, str] | None:
    """(file, stored configuration, kind) of a .safetensors file of ours; None: of another project."""
    from utils import checkpoint, foreign

    if file.suffix not in foreign.SUFFIXES:
        raise InputError(
            f"--weights {file}: wanted a run folder, a checkpoint folder, a diffusers folder, or a file "
            f"({', '.join(foreign.SUFFIXES)})"
        )
    header = checkpoint.read_header(file) if file.suffix == ".safetensors" else {}
    beside, where = file.parent / "config.yaml", f"the configuration in {file}"
    inside = (where, parse_yaml(header[checkpoint.CONFIG], where)) if checkpoint.CONFIG in header else None
    if file.suffix == ".safetensors" and beside.exists():
        layer = (str(beside), read_yaml(beside))
        for name, (own, other) in differences(merge(inside), merge(layer)).items() if inside else ():
            if _is_fixed(name):
                raise InputError(
                    f"--weights {file} holds weights of another architecture or diffusion than {beside}: its header "
                    f"has {name} = {_plain(own)}, the file beside it {_plain(other)}"
                )
    elif inside:
        layer = inside
    else:
        return None
    kind = header.get(checkpoint.KIND) or KINDS.get(file.name, "only")
    if (file.parent / checkpoint.MANIFEST).exists():
        _verified(file.parent)
    if load_ema is not None and kind == "only":
        say(f"{file.name} has one kind of weights: --load_ema does not apply")
    elif load_ema is not None and kind != ("EMA" if load_ema else "raw"):
        raise InputError(f"--weights {file} names the {kind} weights, but --load_ema says otherwise")
    return file, layer, kind


def _find_folder(place: Path, load_ema: bool | None) -> tuple[Path, Layer, str] | None:
    """The same for a run or checkpoint folder, which is verified before anything is read."""
    from utils import checkpoint, foreign

    if checkpoint.is_checkpoint_name(place) or (place / checkpoint.MANIFEST).exists():
        folder = _verified(place)
    elif (place / "ckpt").is_dir():
        folder, _ = checkpoint.newest(place, say)
        if folder is None:
            raise InputError(f"--weights {place}: the run has no good checkpoint")
    elif foreign.is_folder(place):
        return None
    else:
        raise InputError(
            f"--weights {place}: neither a run folder (with ckpt/) nor a checkpoint folder, "
            "nor one of diffusers (with model_index.json or config.json)"
        )
    kind, config = "raw" if load_ema is False else "EMA", folder / "config.yaml"
    return folder / FILES[kind], (str(config), read_yaml(config)), kind


def _verified(folder: Path) -> Path:
    from utils import checkpoint

    why = checkpoint.problem(folder)
    if why:
        raise InputError(f"checkpoint {folder} can't be used: {why}")
    return folder


def _open_foreign(
    found: Foreign, place: Path, model_id: str | None, load_ema: bool | None, asked: list[Layer]
) -> Weights:
    """Another project's checkpoint with what it says, then what was asked for; tells what was assumed."""
    origin = model_id or (place.resolve().name if place.is_dir() else found.file.resolve().parent.name)
    stored = merge((f"what {found.file} says", found.keys()))
    config = merge(*asked, base=stored)
    _check_same(origin, stored, config, [name for name in found.known if name not in ALIKE])
    for note in found.notes:
        say(f"{place.name}: {note}")
    given = {name.partition("[")[0] for _, keys in asked for name in keys}
    assumed = [f"{name} = {_plain(value)}" for name, value in found.assumed.items() if name not in given]
    if assumed:
        say(f"{place.name} does not say, so assumed: {', '.join(assumed)} (give others with -c or --key VALUE)")
    kinds = list(found.sets)
    kind = "raw" if load_ema is False else "EMA"
    if load_ema is not None and kind not in kinds:
        say(f"{place.name} has one kind of weights: --load_ema does not apply")
    kind = kind if kind in kinds else kinds[0]
    if model_id:
        scores = Path("scores", model_id.replace("/", "--"))
    else:
        scores = place.with_name(f"{place.name}-scores") if place.is_dir() else place.parent / "scores"
    return Weights(found.file, config, kind, origin, scores, found.sets)


def _check_same(path: str, stored: DictConfig, config: DictConfig, names: Collection[str]) -> None:
    """Raise InputError where what was asked for contradicts `stored` in one of `names` that the weights depend on."""
    for name, (old, new) in differences(stored, config).items():
        if _is_fixed(name) and name in names and not has_moved(name, old, new):
            raise InputError(f"{name} = {_plain(new)} contradicts the weights in {path}, which have {_plain(old)}")


def _is_fixed(name: str) -> bool:
    """Whether weights depend on a config key."""
    return name.startswith(("model.", "diffusion.")) or name in ("data.image_size", "data.channels")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def load_network(weights: Weights, device, dtype=None, evaluations: float = 0):
    """The network in eval mode on `device`, compiled where it pays for so many evaluations of an image.

    dtype: what evaluations of it are autocast to, always (`precision.keep_cast`); None: nothing, or not always that.

    Raises InputError where file and architecture differ.
    """
    import torch

    from models import build_model
    from models.flops import forward_flops
    from utils import checkpoint, compilation, precision

    cfg = weights.config
    with torch.device("meta"):  # no initial weights are drawn, which takes longer than to read these
        net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels, cfg.diffusion.learn_variance)
    net = net.to_empty(device="cpu")
    checkpoint.load_weights(net, weights.tensors(), weights.file)
    net = net.to(device, memory_format=torch.channels_last)
    if precision.wants_compile(cfg.sample.compile, lambda: evaluations * forward_flops(net)):
        compilation.compile_network(net, cfg)
    precision.keep_cast(net, dtype)
    return net.eval().requires_grad_(False)
