"""One training per run folder: a lock that the operating system releases when its owner ends, however it ends."""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from utils.errors import InputError

NAME = ".lock"


def lock(run: Path) -> IO[str]:
    """Lock the run folder for as long as the returned file stays open; at a regular exit the file goes too.

    Raises:
        InputError: another process holds it; the message names it.
    """
    path = run / NAME
    while True:
        file = open(path, "a+")  # noqa: SIM115 (held open on purpose)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{run} is being trained by {owner}: wait for it, stop it, or choose another -e") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner has just removed it: what we hold is no longer the lock
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    atexit.register(_remove, path.resolve(), file)
    return file


def _remove(path: Path, file: IO[str]) -> None:
    if not file.closed and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
        path.unlink()
