"""train.log read again: its lines, the starts of a run, and how long it trained."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (\w+) +(.*)")
Log = list[tuple[datetime, str, str]]


def read_log(path: Path) -> Log:
    """(time, first word, rest) of each line of train.log that has them."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        if match := LOG_LINE.fullmatch(line):
            try:
                found.append((datetime.fromisoformat(match[1]), match[2], match[3]))
            except ValueError:
                continue
    return found


def _is_start(word: str, text: str) -> bool:
    return word == "run" and text.startswith("folder")


def starts(log: Log) -> int:
    return sum(_is_start(word, text) for _, word, text in log)


def seconds_trained(log: Log) -> float:
    """From each start to its last line, summed: a lower bound of the training time."""
    total, begun, last = 0.0, None, None
    for when, word, text in log:
        if _is_start(word, text):
            total += (last - begun).total_seconds() if begun else 0.0
            begun = when
        last = when
    return total + ((last - begun).total_seconds() if begun else 0.0)


def duration(seconds: float) -> str:
    """`2 h 5 min` or `3 min 7 s`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
