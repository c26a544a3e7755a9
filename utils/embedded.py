"""Pictures as data: URIs, so that a page holds them and needs no other file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from utils.data.decode import MAX_PIXELS

LARGE = 300_000  # bytes; a larger PNG is embedded as JPEG
LONGEST = 1024  # pixels of that JPEG's longer side


@dataclass(frozen=True)
class Picture:
    """An embedded picture, or why there is none (`uri` is empty then)."""

    caption: str
    uri: str = ""
    pixels: tuple[int, int] = (0, 0)  # width, height
    note: str = ""


def embed(path: Path, caption: str) -> Picture:
    """A PNG as it is; a large one reduced, which the note says; one that can't be read as the reason."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.load()
            if len(data) <= LARGE:
                return Picture(caption, _uri("png", data), image.size)
            note = f"reduced from {image.width} x {image.height} pixels"
            image = image.convert("RGB")
            image.thumbnail((LONGEST, LONGEST))
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=85)
            return Picture(caption, _uri("jpeg", jpeg.getvalue()), image.size, note)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Picture(caption, note=f"can't be read: {error}".replace(str(path), path.name))


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def spread(paths: list[Path], most: int) -> list[Path]:
    """At most `most` of them, the first and the last among them, evenly between."""
    if len(paths) <= most:
        return paths
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
