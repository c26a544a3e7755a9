"""Work in the background that can be watched and stopped: one user's long job leaves the page free."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

INTERVAL = 0.12  # between two looks [seconds]


class Stopped(Exception):
    """The user has stopped the work, or is gone."""


class Watched:
    """A network that counts its evaluations and ends the work at the next one when asked to stop."""

    def __init__(self, net, work: Work) -> None:
        self._net, self._work = net, work

    def __call__(self, x, t, **cond):
        self._work.check()
        out = self._net(x, t, **cond)
        self._work.evaluations += len(x)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)


class Work:
    """A function run by a pool of threads; `follow` shows how far it is, `stop` ends it.

    folder: for its files, which `discard` removes.
    """

    def __init__(self, pool: ThreadPoolExecutor, function: Callable[[Work], Any], place: Path) -> None:
        """function: gets this object; calls `show` with what there is to see, returns the result.

        place: where the folder is made.
        """
        self.folder = Path(tempfile.mkdtemp(dir=place))
        self.evaluations = 0  # of the network, times images
        self.started: float | None = None  # None: waits for a free thread
        self._latest, self._stop = None, threading.Event()
        self._future = pool.submit(self._run, function)

    def _run(self, function: Callable[[Work], Any]) -> Any:
        self.check()
        self.started = time.monotonic()
        return function(self)

    @property
    def seconds(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def running(self) -> bool:
        return not self._future.done()

    def check(self) -> None:
        """Raise Stopped where that was asked for."""
        if self._stop.is_set():
            raise Stopped

    def show(self, seen: Any) -> None:
        self._latest = seen

    def stop(self) -> None:
        self._stop.set()

    def discard(self) -> None:
        """Stop, and remove the files as soon as that is done."""
        self.stop()
        self._future.add_done_callback(lambda _: shutil.rmtree(self.folder, ignore_errors=True))

    def result(self, timeout: float | None = None) -> Any:
        """What the function returned. Raises what it raised, Stopped among that."""
        return self._future.result(timeout)

    def follow(self) -> Iterator[Any]:
        """What was shown last, a few times a second until the work ends; None before there is anything.

        A follower that goes away stops the work.
        """
        shown = False
        try:
            while self.running:
                latest = self._latest
                if latest is not shown:
                    yield latest
                shown = latest
                time.sleep(INTERVAL)
        finally:
            if self.running:
                self.stop()


class Works:
    """The work of every visitor, one each: who starts another ends the one before."""

    def __init__(self, n_threads: int, place: Path) -> None:
        """place: a folder for what they make."""
        self.place = place
        self._pool, self._lock = ThreadPoolExecutor(n_threads, "explorer"), threading.Lock()
        self._works: dict[str, Work] = {}

    def start(self, visitor: str, function: Callable[[Work], Any]) -> Work:
        with self._lock:
            if before := self._works.get(visitor):
                before.discard()
            self._works[visitor] = work = Work(self._pool, function, self.place)
        return work

    def of(self, visitor: str) -> Work | None:
        return self._works.get(visitor)

    def leave(self, visitor: str) -> None:
        """The visitor is gone, and so are the files."""
        with self._lock:
            work = self._works.pop(visitor, None)
        if work:
            work.discard()

    def close(self) -> None:
        for visitor in list(self._works):
            self.leave(visitor)
        self._pool.shutdown(wait=True, cancel_futures=True)
