"""What an evaluation will take: counted before it starts, timed from its first micro-batch on."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from utils.cli import say
from utils.errors import is_main_process


class Cost:
    """Network evaluations of all cells together; says what is known as soon as it is known."""

    def __init__(self, evaluations: list[int], n: int, processes: int) -> None:
        """evaluations: per image, of each cell; n: images per cell."""
        self.cells, self.total, self.processes = len(evaluations), n * sum(evaluations), processes
        self.done, self.seconds, self.cells_done = 0, 0.0, 0
        self._since = 0.0
        if evaluations:
            cells = "1 cell" if self.cells == 1 else f"{self.cells} cells"
            say(f"{cells}: {n * self.cells:,} images, {self.total:,} network evaluations")

    def start(self) -> None:
        """Generation begins, or goes on after something else."""
        self._since = time.monotonic()

    def add(self, evaluations: int) -> None:
        """This process has made so many; the others work as fast."""
        first = not self.done
        self.done += evaluations * self.processes
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if first:
            rate = f"{self.done / self.seconds:,.0f} network evaluations a second"
            if is_main_process():  # past the bar that is being drawn
                whole = timedelta(seconds=round(self.total * self.seconds / self.done))
                tqdm.write(f"about {whole} for all of it, going by the first batch ({rate})", file=sys.stderr)

    def skip(self, evaluations: int) -> None:
        """So many need not be made: they are on disk already."""
        self.total -= evaluations

    def left(self) -> float:
        """Seconds of generation to come."""
        return max(self.total - self.done, 0) * self.seconds / max(self.done, 1)

    def cell_done(self, label: str, scores: dict[str, float]) -> None:
        self.cells_done += 1
        values = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if not name.endswith("_std"))
        left = f"; about {timedelta(seconds=round(self.left()))} left" if self.cells_done < self.cells else ""
        count = f" ({self.cells_done} of {self.cells}{left})" if self.cells else ""  # a folder of images is no cell
        say(f"{label}: {values}{count}")
