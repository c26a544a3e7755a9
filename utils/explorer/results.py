"""What there is to see of a request while it is drawn, and what it has made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diffusions.pixels import to_uint8
from utils.images import grid


@dataclass
class Panel:
    """One picture and what stands above and beneath it."""

    title: str
    picture: Tensor  # uint8 [C, H, W]
    caption: str = ""


@dataclass
class Seen:
    """What there is to see while a request is drawn."""

    panels: list[Panel]
    stage: str  # what is being done
    share: float  # of it, 0 to 1


@dataclass
class Made:
    """A file to take away, and the command that makes it, bit for bit on the same CPU."""

    name: str
    path: Path
    command: str


@dataclass
class Result:
    """What a request has made."""

    panels: list[Panel]
    files: list[Made]
    seconds: float
    notes: list[str] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)  # of an interpolation, uint8 [C, H, W]


class Later:
    """A grid of images in [-1, 1] that is made only if somebody looks."""

    def __init__(self, images: Tensor, columns: int | None) -> None:
        self.images, self.columns = images, columns

    def __call__(self) -> Tensor:
        return grid(to_uint8(self.images).cpu(), self.columns)
