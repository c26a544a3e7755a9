"""One encoded image -> pixels: PNG, JPEG, WebP or BMP by content, any mode and size."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.image_set import to_channels
from utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content; others would start programs, as PostScript does
MAX_PIXELS = 89_478_485  # where Pillow begins to suspect a decompression bomb
ERRORS = (OSError, SyntaxError, ValueError, AssertionError, Image.DecompressionBombError)


def read_image(path: Path | str, channels: int) -> Tensor:
    """An image file -> uint8 [channels, H, W], as `decode`."""
    return _decode(path, channels, str(path))


def decode(data: bytes, channels: int, name: str) -> Tensor:
    """The bytes of an image file -> uint8 [channels, H, W].

    The file's orientation tag is ignored, transparency is laid over white, 16-bit gray is scaled to 8 bits.

    Raises:
        InputError: it can't be decoded, or declares more than MAX_PIXELS; `name` is named.
    """
    return _decode(io.BytesIO(data), channels, name)


def image_header(file: Path | bytes, name: str | None = None) -> tuple[tuple[int, int], bool]:
    """((width, height), whether it is gray) without decoding the pixels. Raises InputError for no image."""
    name = name or str(file)
    try:
        with _open(io.BytesIO(file) if isinstance(file, bytes) else file, name) as image:
            return image.size, image.mode in ("1", "L", "I", "I;16", "I;16B")
    except ERRORS as error:
        raise InputError(f"image {name} can't be read: {error}") from None


def _decode(file: Path | str | io.BytesIO, channels: int, name: str) -> Tensor:
    try:
        with _open(file, name) as image:
            if image.mode in ("I;16", "I;16B", "I"):
                levels = np.asarray(image, dtype=np.int64) * 255 / 65535
                image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            image = image.convert("RGB" if image.mode not in ("L", "1") else "L")
            pixels = torch.from_numpy(np.array(image))
    except ERRORS as error:
        raise InputError(f"image {name} can't be read: {error}") from None
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return to_channels(pixels, channels)


def _open(file: Path | str | io.BytesIO, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"image {name} declares {image.width}x{image.height} pixels: refused")
    return image
