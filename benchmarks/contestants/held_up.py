"""A trainer that can't be called step by step: it runs in a thread of its own, and its batches wait for `next`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Queue


class HeldUp:
    """Give the trainer `batches(its own)`, and iterate over `units(its method)`: a unit of work per `next`."""

    def __init__(self) -> None:
        self.go, self.done = Queue(), Queue()

    def batches(self, batches: Iterable) -> Iterator:
        for batch in batches:
            self.done.put(None)  # the unit before this batch is over; before the first batch, the set-up is
            self.go.get()
            yield batch

    def units(self, train: Callable[[], object]) -> Iterator[None]:
        def run() -> None:
            try:
                train()
            except BaseException as error:
                self.done.put(error)

        threading.Thread(target=run, daemon=True).start()
        while True:
            error = self.done.get()
            if error is not None:
                raise error
            yield
            self.go.put(None)
