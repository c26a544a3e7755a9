"""metadata.jsonl: a line {"file_name": ..., "text": ...} per image, the convention of Hugging Face's image folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from utils.data.sources import Files, Source, Zip
from utils.errors import InputError

NAME = "metadata.jsonl"


def texts_of(root: Path, source: Source) -> list[str | None] | None:
    """The text of each image of a source; None where no metadata.jsonl lies in `root`, an image's folder or above it.

    file_name is relative to the folder of its metadata.jsonl. An image that no line names has no text.

    Raises:
        InputError: a line that is not such an object, or names an image twice or one that is not there.
    """
    names, read = _names(root, source)
    folders = sorted({str(parent) for name in names for parent in PurePosixPath(name).parents})
    found: dict[str, str] = {}
    any_file, wanted = False, set(names)
    for folder in folders:
        path = str(PurePosixPath(folder) / NAME)
        text = read(path)
        if text is None:
            continue
        any_file = True
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{root / path}, line {number}"
            try:
                entry = json.loads(line)
                name = str(PurePosixPath(folder) / entry["file_name"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f'{where}: wanted an object such as {{"file_name": "0.png", "text": "..."}}') from None
            if name not in wanted:
                raise InputError(f"{where}: there is no image {entry['file_name']}")
            if name in found:
                raise InputError(f"{where}: names {entry['file_name']} for the second time")
            if isinstance(entry.get("text"), str):
                found[name] = entry["text"]
    return [found.get(name) for name in names] if any_file else None


def _names(root: Path, source: Source) -> tuple[Sequence[str], Callable[[str], str | None]]:
    """(each image's path below the root, how to read a text file there; None where it does not exist)."""
    try:
        if isinstance(source, Zip):
            archive = source.handle()
            held = set(archive.namelist())
            return source.members, lambda path: archive.read(path).decode() if path in held else None
        assert isinstance(source, Files)
        names = [path.relative_to(root).as_posix() for path in source.paths]
        return names, lambda path: (root / path).read_text("utf-8") if (root / path).is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{NAME} in {root} can't be read: {error}") from None
