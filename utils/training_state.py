"""Everything a training step depends on besides (config, seed, step): gathered for a checkpoint, put back from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from ema_pytorch import EMA
from torch import nn

from utils import checkpoint
from utils.config import to_yaml
from utils.distributed import from_main
from utils.errors import InputError, SaveFailed, TrainingDiverged
from utils.meter import Meter
from utils.sharding import Sharding, divided_like
from utils.state import read_state


def save(
    run, step: int, accelerator: Accelerator, sharding: Sharding, net: nn.Module, ema: EMA, optimizer, meter: Meter,
    log, must: bool, best: dict[str, Any] | None, **more: Any,
) -> None:  # fmt: skip
    """Publish a checkpoint of `step` updates, prune, and tell the log. A collective; the main process writes.

    One that can't be written is told as well, and the run goes on, unless it must be or train.save_failure says stop.
    best: {"step", "score"} of the best checkpoint so far, to which ckpt/best shall point.
    more: further JSON values for state.json, such as what `auto` was resolved to.

    Raises:
        SaveFailed, TrainingDiverged (the weights are not finite): on every process.
    """
    state = {
        "step": step,
        "meter": meter.state(),
        "ema": {"step": int(ema.step), "initted": bool(ema.initted)},
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "best": best,
        **more,
    }
    failure = None
    if accelerator.is_main_process or sharding.on:
        parts = [sharding.gathered(part.state_dict()) for part in (net, ema.ema_model, optimizer)]
    if accelerator.is_main_process:
        try:
            checkpoint.publish(run.folder / "ckpt", step, to_yaml(run.config), *parts, state)
        except (SaveFailed, TrainingDiverged) as error:
            failure = type(error), str(error)
        else:
            _tidy(run, best, log)
    failure = from_main(accelerator, failure)
    if failure is None:
        log.saved(step)
        return
    kind, why = failure
    why += f"; the checkpoints before it in {run.folder / 'ckpt'} are untouched"
    log.say(f"not saved   {why}")
    if must or kind is TrainingDiverged or run.config.train.save_failure == "stop":
        raise kind(why)


def _tidy(run, best: dict[str, Any] | None, log) -> None:
    try:
        if best is not None:
            checkpoint.mark_best(run.folder, best["step"])
        checkpoint.prune(run.folder, run.config.train.keep_last)
    except OSError as error:
        log.say(f"not removed {run.folder / 'ckpt'} keeps its older checkpoints: {error.strerror}")


def restore(folder: Path, accelerator: Accelerator, net: nn.Module, ema: EMA, optimizer) -> dict[str, Any]:
    """Put weights, EMA, optimizer and loss scale back; returns state.json.

    Raises:
        InputError: a part is missing, damaged, or of another architecture; it is named.
    """
    state = read_state(folder)
    for module, name in ((net, "model.safetensors"), (ema.ema_model, "ema.safetensors")):
        weights, own = checkpoint.read_weights(folder / name), module.state_dict()
        weights = {n: divided_like(value, own[n]) if n in own else value for n, value in weights.items()}
        checkpoint.load_weights(module, weights, folder / name)
    ema.step.fill_(state["ema"]["step"])
    ema.initted.fill_(state["ema"]["initted"])
    _load_optimizer(folder / "optimizer.pt", optimizer, fresh=state["step"] == 0)
    for parameter, held in optimizer.state.items():  # fused kernels pair memory by position: take the weights' layout
        held |= {n: torch.empty_like(parameter).copy_(v) for n, v in held.items() if v.shape == parameter.shape}
    if accelerator.scaler is not None and state["scaler"]:
        try:
            accelerator.scaler.load_state_dict(state["scaler"])
        except KeyError as error:
            raise InputError(f"{folder / 'state.json'}: the loss scaler lacks {error}") from None
    return state


def _load_optimizer(path: Path, optimizer, fresh: bool) -> None:
    """Adam's moments, every shape checked: a fused update would go on behind the end of one that is too short.

    fresh: no update was made yet, so there may be none.
    """
    try:
        stored = checkpoint.read_optimizer(path.parent)
        groups, own = stored["param_groups"], optimizer.state_dict()["param_groups"]
        for ours, theirs in zip(own, groups, strict=True):
            if any(_plain(ours[name]) != _plain(theirs[name]) for name in ours.keys() & theirs.keys() - {"lr"}):
                raise ValueError("its settings are not those of the configuration")
        parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        lacking = parameters.keys() - stored["state"].keys()
        if lacking and not (fresh and len(lacking) == len(parameters)):
            raise ValueError(f"the moments of parameter {min(lacking)} are missing")
        for i, held in stored["state"].items():
            shapes = {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}
            if {name: value.shape for name, value in held.items()} != shapes:
                raise ValueError(f"the moments of parameter {i} have another shape")
            if not all(value.is_floating_point() for value in held.values()):
                raise ValueError(f"the moments of parameter {i} are not floating-point numbers")
        divided = {
            i: {n: divided_like(value, parameters[i]) for n, value in held.items()}
            for i, held in stored["state"].items()
        }
        optimizer.load_state_dict({"state": divided, "param_groups": own})
    except Exception as error:  # whatever the structure of a file that is not ours leads to
        raise InputError(f"{path} can't be loaded: {error or type(error).__name__}") from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
