"""`evaluate_ddpm.py --verify results.json`: every row computed again by its own command line, and compared."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import cli
from utils.errors import InputError, is_main_process

SAME = 1e-6  # relative: nothing but the order of additions
CLOSE = 0.01  # relative: other hardware, other versions, bf16
MOVED = ("weights", "images", "reference", "feature_extractor_weights", "micro_batch")  # may be given anew


def verify(options: argparse.Namespace, overrides: dict[str, str], evaluate_again: Callable[[list[str]], int]) -> int:
    """Print a line per score: stored, now, and whether they agree. Exit status 0 where all do, 1 where one does not.

    evaluate_again(arguments): an evaluation into the folder that they name with --out.

    Raises:
        InputError: a file that can't be read, or rows without their command line.
    """
    given = {name: getattr(options, name) for name in MOVED if getattr(options, name) is not None}
    cache = {name: value for name, value in overrides.items() if name in ("evaluate.cache_dir", "data.root")}
    if wrong := sorted(set(overrides) - set(cache)):
        raise InputError(f"--{wrong[0]} with --verify: the rows say all of it, but {', '.join(MOVED)} may have moved")
    rows = read_rows(Path(options.verify))
    table, ok = [["images", "score", "stored", "now", "verdict"]], True
    for i, row in enumerate(rows):
        cli.say(f"{i + 1} of {len(rows)}: {row['label']}")
        found = computed(row, given, cache, evaluate_again)
        for name, stored in row["scores"].items():
            verdict = judge(name, row, found) if found else "protocol differs"
            ok &= verdict in ("same", "close")
            now = f"{found['scores'][name]:.8g}" if found and name in found["scores"] else ""
            table.append([row["label"], name, f"{stored:.8g}", now, verdict])
    from utils.results import markdown

    cli.show(markdown(table))
    cli.say(f"{options.verify}: {len(rows)} rows, {'all agree' if ok else 'NOT all agree'} "
            f"(same: within {SAME:g} of the value; close: within {CLOSE:g}, or a tenth of its own spread)")  # fmt: skip
    return 0 if ok else 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.json. Raises InputError where it can't be read or can't be repeated."""
    try:
        rows = json.loads(path.read_text())["rows"]
        lacking = [row["label"] for row in rows if not {"id", "label", "scores", "n"} <= row.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--verify {path} can't be read: wanted the results.json of an evaluation") from None
    lacking += [row["label"] for row in rows if "repeat" not in row]
    if lacking or not rows:
        what = f"its row {lacking[0]!r} lacks the command line that repeats it" if lacking else "it has no rows"
        raise InputError(f"--verify {path}: {what}: evaluate again with this version")
    return rows


def computed(
    row: dict[str, Any], given: dict[str, Any], cache: dict[str, str], evaluate_again: Callable[[list[str]], int]
) -> dict[str, Any] | None:
    """The row made anew; None where what it would be of is not what the stored one was of. A collective."""
    arguments = list(row["repeat"])
    for name, value in given.items():
        if f"--{name}" in arguments:
            arguments[arguments.index(f"--{name}") + 1] = str(value)
        elif name == "feature_extractor_weights":
            arguments.append(f"--evaluate.{name}={value}")
    arguments += [f"--{name}={value}" for name, value in cache.items()]
    with tempfile.TemporaryDirectory() as out:
        with contextlib.redirect_stdout(io.StringIO()):  # its table has this one row
            evaluate_again([*arguments, "--out", out])
        if not is_main_process():
            return row  # the main process judges
        found = json.loads(Path(out, "results.json").read_text())["rows"][0]
    return found if found["id"] == row["id"] else None


def judge(name: str, stored: dict[str, Any], found: dict[str, Any]) -> str:
    """same, close or DIFFERS."""
    if name not in found["scores"]:
        return "missing"
    a, b = stored["scores"][name], found["scores"][name]
    difference = abs(a - b)
    if a == b or difference <= SAME * max(abs(a), abs(b)):
        return "same"
    spread = stored["scores"].get(f"{name.removesuffix('_std')}_std", 0.0)
    near = math.isfinite(difference) and difference <= max(CLOSE * max(abs(a), abs(b)), spread / 10)
    return "close" if near else "DIFFERS"
