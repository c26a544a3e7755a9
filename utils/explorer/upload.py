"""An uploaded picture -> a folder that `--source` takes; what is too large is refused before it is decoded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchvision.transforms.v2 import functional as transforms

from utils.data.decode import decode, image_header
from utils.data.image_set import fit
from utils.errors import InputError
from utils.images import file_name, write_png

MOST_BYTES = 10 * 2**20  # of an uploaded file
MOST_PIXELS = 25_000_000  # that it may declare: 75 MB decoded


def save_upload(file: str | None, folder: Path, channels: int, image_size: int) -> Path:
    """The centre square of a picture, resized to [channels, image_size, image_size], in a folder below `folder`.

    The folder is named by the pixels, so that the same picture has the same command.

    Raises:
        InputError: no file, too many bytes or pixels, no image of a known format, or the folder can't be written.
    """
    if not file:
        raise InputError("no image was uploaded: choose a PNG, JPEG, WebP or BMP file")
    path = Path(file)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise InputError(f"image {path.name} has {size:,} bytes; at most {MOST_BYTES:,} are read")
    data = path.read_bytes()
    (width, height), _ = image_header(data, path.name)
    if width * height > MOST_PIXELS:
        raise InputError(f"image {path.name} declares {width}x{height} pixels; at most {MOST_PIXELS:,} are decoded")
    pixels = decode(data, channels, path.name)
    side = min(width, height)  # cut before resizing: a line of a million pixels would become a huge picture
    pixels = fit(transforms.center_crop(pixels, [side, side]), image_size)
    name = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:8]
    place = folder / f"source-{name}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_png(place / file_name(0), pixels)
    except OSError as error:
        raise InputError(f"--save_dir {folder} can't be written: {error.strerror}") from None
    return place
