"""Run a script and die by SIGKILL at a chosen moment of its writing; the project itself holds no hook for it.

    DIE_AT="half model.safetensors" DIE_NTH=2 python tests/kill_at.py train_ddpm.py ...

A moment is "before VERB FILE", VERB one of make, write, fsync, hash, chmod, rename, replace, append, remove; or
"half FILE": half of the file's bytes are there. With MOMENTS=FILE all moments met are written to FILE instead.
"""

import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

NAMES = [  # of files and folders that have another name each time
    (r"^\.staging-step\d+$", "doomed"),
    (r"^\.staging-\w+$", "staging"),
    (r"^\.(\d+|step\d+)\.png\.tmp$", "new image"),
    (r"^\.(.+?)(\.\d+)?\.tmp$", r"new \1"),
    (r"^step\d+$", "old checkpoint"),
]


def name(path: Any) -> str | None:
    """What a path is called in a moment; None for what the project does not write by itself."""
    if not isinstance(path, (str, pathlib.Path)):
        return None
    path = pathlib.Path(path)
    known = ("ckpt", ".tmp", ".staging-")
    if not any(mark in f"{path.parent.name}/{path.name}" for mark in known) and path.suffix not in (".jsonl", ".log"):
        return None
    found = path.name
    for pattern, to in NAMES:
        found = re.sub(pattern, to, found)
    return found


class Death:
    """Counts the moments that pass and ends the process at the chosen one."""

    def __init__(self, moment: str | None, nth: int = 1) -> None:
        self.moment, self.nth, self.met, self.lock = moment, nth, Counter(), threading.Lock()

    def comes(self, moment: str) -> bool:
        with self.lock:  # images are written by several threads
            self.met[moment] += 1
            return moment == self.moment and self.met[moment] == self.nth

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, function: str, verb: str, argument: int | str, half: Callable | None = None) -> None:
        """Die before owner.function(...), or after half(original, path, *args), for the path in its argument."""
        original = getattr(owner, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            what = name(kwargs.get(argument, "") if isinstance(argument, str) else args[argument])
            if what is not None:
                if self.comes(f"before {verb} {what}"):
                    self.strike()
                if half and self.comes(f"half {what}"):
                    half(original, args[argument], *args)
                    self.strike()
            return original(*args, **kwargs)

        setattr(owner, function, watched)


def half_written(original: Callable, path: Any, *args: Any) -> None:
    original(*args)
    os.truncate(path, os.path.getsize(path) // 2)


def half_appended(original: Callable, path: Any, *args: Any) -> None:
    before = os.path.getsize(path) if os.path.exists(path) else 0
    original(*args)
    os.truncate(path, (before + os.path.getsize(path)) // 2)


def half_removed(original: Callable, path: Any, *args: Any) -> None:
    for file in sorted(pathlib.Path(path).iterdir())[::2]:
        file.unlink()


def arm(death: Death) -> None:
    """Watch everything through which checkpoints, logs and images come to disk."""
    import torch

    import utils.checkpoint
    import utils.logging

    death.watch(tempfile, "mkdtemp", "make", "dir")
    death.watch(pathlib.Path, "write_text", "write", 0, half_written)
    death.watch(pathlib.Path, "write_bytes", "write", 0, half_written)
    death.watch(utils.checkpoint, "save_file", "write", 1, half_written)
    death.watch(torch, "save", "write", 1, half_written)
    death.watch(utils.checkpoint, "_fsync", "fsync", 0)
    death.watch(utils.checkpoint, "sha256", "hash", 0)
    death.watch(os, "chmod", "chmod", 0)
    death.watch(os, "rename", "rename", 0)
    death.watch(os, "replace", "replace", 0)
    death.watch(shutil, "rmtree", "remove", 0, half_removed)
    death.watch(utils.logging, "append_line", "append", 0, half_appended)


if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root))
    death = Death(os.environ.get("DIE_AT"), int(os.environ.get("DIE_NTH", "1")))
    if os.environ.get("RANK", "0") == "0":
        arm(death)
    sys.argv[:] = sys.argv[1:]
    try:
        runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
    finally:
        if "MOMENTS" in os.environ and os.environ.get("RANK", "0") == "0":
            with open(os.environ["MOMENTS"], "w") as file:
                file.writelines(f"{n}\t{moment}\n" for moment, n in death.met.items())
