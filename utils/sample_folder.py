"""SAVE_DIR: only samples and protocol.json, which says what made them; the same protocol goes on where it stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from utils.checkpoint import write_atomically
from utils.errors import InputError
from utils.images import file_name

PROTOCOL = "protocol.json"
SAMPLE = re.compile(r"(\d{6,})\.png")
IDENTITY = "identity"  # the part of the protocol that images are a function of; the rest is circumstance


def check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Raise InputError where the folder holds anything that this protocol did not make. Changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--save_dir {folder} is a file")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    names = [name for name in names if not re.fullmatch(r"\..*\.tmp", name)]  # half-written by a killed process
    if not names:
        return
    foreign = [name for name in names if not SAMPLE.fullmatch(name) and name != PROTOCOL]
    if foreign or PROTOCOL not in names:
        raise InputError(f"--save_dir {folder} already holds {(foreign or names)[0]}: choose an empty folder")
    try:
        stored = dict(json.loads((folder / PROTOCOL).read_text())[IDENTITY])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--save_dir {folder}: its {PROTOCOL} can't be read: choose another folder") from None
    different = [name for name in dict.fromkeys([*identity, *stored]) if identity.get(name) != stored.get(name)]
    if different:
        name = different[0]
        raise InputError(
            f"--save_dir {folder} holds images of another protocol ({name} was {_short(stored.get(name))}, "
            f"now {_short(identity.get(name))}): choose another folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def start_folder(folder: Path, identity: dict[str, Any], circumstances: dict[str, Any]) -> None:
    """Make the folder, clear half-written files of a killed process, and write protocol.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        text = json.dumps({IDENTITY: identity, **circumstances}, indent=1) + "\n"
        write_atomically(folder / PROTOCOL, lambda path: path.write_text(text))
    except OSError as error:
        raise InputError(f"--save_dir {folder} can't be written: {error.strerror}") from None


def missing(folder: Path, n: int) -> list[int]:
    """Which of the samples 0..n-1 are not there yet; the folder need not be, either."""
    paths = folder.iterdir() if folder.is_dir() else ()
    present = {int(match[1]) for path in paths if (match := SAMPLE.fullmatch(path.name))}
    return [i for i in range(n) if i not in present]


def sample_paths(folder: Path, n: int) -> list[Path]:
    return [folder / file_name(i) for i in range(n)]
