"""state.json of a checkpoint: what training goes on from besides weights and optimizer, checked before use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.checkpoint import is_checkpoint_name, step_of
from utils.errors import InputError
from utils.meter import NAMES
from utils.precision import DTYPES


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _dict(**entries: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(n in value and ok(value[n]) for n, ok in entries.items())


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


REQUIRED = {"step": _count, "ema": _dict(step=_count, initted=_flag)}
OPTIONAL = {  # null or absent where there was none
    "best": _dict(step=_count, score=_number),
    "meter": _dict(**dict.fromkeys(NAMES, _number)),
    "resolved": _dict(mixed_precision=lambda v: v in list(DTYPES), compile=_flag, deterministic=_flag),
    "scaler": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder. Raises InputError, which names the part that can't be right."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read: {error}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no named values")
    wrong = [name for name, ok in REQUIRED.items() if not ok(state.get(name))]
    wrong += [name for name, ok in OPTIONAL.items() if state.get(name) is not None and not ok(state[name])]
    if not wrong and is_checkpoint_name(folder) and state["step"] != step_of(folder):
        wrong = ["step"]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} = {state.get(wrong[0])!r} can't be right")
    return state
