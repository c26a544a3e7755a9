"""Where encoded images lie: files, a zip archive, an LMDB, a table. Each gives the bytes of image i and its name."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from utils.data.decode import SUFFIXES
from utils.errors import InputError

MAX_BYTES = 2**29  # of one encoded image


class Source(Protocol):
    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What errors call image i."""

    def read(self, i: int) -> bytes:
        """The bytes of its file. Raises InputError where they can't be had."""


class Files:
    """Image files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def read(self, i: int) -> bytes:
        try:
            return self.paths[i].read_bytes()
        except OSError as error:
            raise InputError(f"image {self.paths[i]} can't be read: {error.strerror}") from None


class Zip:
    """The images in a zip archive, read without unpacking; `members` are their paths in it, sorted."""

    def __init__(self, path: Path) -> None:
        self.path, self._archive, self._process = path, None, None
        entries = [entry for entry in self.handle().infolist() if _is_image(PurePosixPath(entry.filename))]
        if not entries:
            raise InputError(f"zip archive {path} holds no {', '.join(s[1:] for s in SUFFIXES)} file")
        for entry in entries:
            if entry.flag_bits & 1:
                raise InputError(f"zip archive {path}: {entry.filename} is encrypted")
            if entry.file_size > MAX_BYTES:
                raise InputError(f"zip archive {path}: {entry.filename} declares {entry.file_size:,} bytes: refused")
        self.members = sorted(entry.filename for entry in entries)

    def handle(self) -> zipfile.ZipFile:
        """Every process opens it for itself: what was opened before a fork shares its position."""
        if self._process != os.getpid():
            self._archive, self._process = self._open(), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None, "_process": None}

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"zip archive {self.path} can't be read: {error}") from None

    def __len__(self) -> int:
        return len(self.members)

    def name(self, i: int) -> str:
        return f"{self.path}:{self.members[i]}"

    def read(self, i: int) -> bytes:
        try:
            return self.handle().read(self.members[i])
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"image {self.name(i)} can't be read: {error}") from None


class Lmdb:
    """The values of an LMDB, all of its keys in their order or the given ones."""

    _opened: dict[Path, tuple[int, Any]] = {}  # path -> (process, environment): none may be open twice

    def __init__(self, path: Path, keys: Sequence[bytes] | None = None) -> None:
        self.path = path.resolve()
        with self.handle().begin() as transaction:
            found = list(transaction.cursor().iternext(keys=True, values=False)) if keys is None else keys
        if not found:
            raise InputError(f"LMDB {path} is empty")
        self.keys = np.array(found)  # of bytes: 40 a key instead of 80, and nothing for forks to count

    def handle(self) -> Any:
        process, environment = self._opened.get(self.path, (None, None))
        if process != os.getpid():
            if environment is not None:
                environment.close()  # this fork's copy: without locks, nothing is shared with the parent's
            environment = self._open()
            self._opened[self.path] = os.getpid(), environment
        return environment

    def _open(self) -> Any:
        try:
            import lmdb
        except ImportError:
            raise InputError(f"{self.path} is an LMDB, and the package lmdb is missing: pip install lmdb") from None
        if self.path.is_dir() and not (self.path / "data.mdb").is_file():
            raise InputError(f"{self.path} is no LMDB: it has no data.mdb (unpack the downloaded archive)")
        try:
            return lmdb.open(
                str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
            )
        except lmdb.Error as error:
            raise InputError(f"LMDB {self.path} can't be read: {error}") from None

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, i: int) -> str:
        return f"{self.path}:{self.keys[i].decode(errors='replace')}"

    def get(self, key: bytes) -> bytes | None:
        """The value of a key. Raises InputError where the LMDB is damaged."""
        import lmdb

        try:
            with self.handle().begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise InputError(f"LMDB {self.path} can't be read: {error}") from None

    def read(self, i: int) -> bytes:
        value = self.get(self.keys[i].item())
        if value is None:
            raise InputError(f"LMDB {self.path} lacks the key {self.keys[i].decode(errors='replace')}")
        return value


class Table:
    """A column of images in a table of Hugging Face's `datasets`, not decoded there."""

    def __init__(self, table: Any, column: str, name: str, paths: bool) -> None:
        """paths: whether a row may name a file in place of holding it."""
        self.table, self.column, self.title, self.paths = table, column, name, paths

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return f"{self.title}, row {i}"

    def read(self, i: int) -> bytes:
        held = self.table[int(i)][self.column] or {}
        if held.get("bytes") is None and not (self.paths and held.get("path")):
            raise InputError(f"{self.name(i)} holds no image in its column {self.column}")
        return held["bytes"] if held.get("bytes") is not None else Files([Path(held["path"])]).read(0)


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden
