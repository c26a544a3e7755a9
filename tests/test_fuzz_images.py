"""Seeded noise in image files: pixels, or an error that names the file, and soon."""

import random
import struct
import time
import zlib

import torch
from PIL import Image
from test_fuzz_checkpoints import damage

from utils.data.decode import image_header, read_image
from utils.errors import InputError

SOON = 2  # seconds of CPU
PIXELS = Image.frombytes("RGB", (13, 9), random.Random(3).randbytes(13 * 9 * 3))
KINDS = [
    *(("png", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16")), ("webp", "RGB", {}),
    *(("png", mode, {"transparency": t}) for mode, t in (("1", 0), ("L", 5), ("RGB", (1, 2, 3)), ("P", bytes(99)))),
    *(("jpeg", mode, {}) for mode in ("L", "RGB", "CMYK")), ("jpeg", "RGB", {"progressive": True}),
    *(("bmp", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")), ("webp", "RGBA", {"lossless": True}),
]  # fmt: skip


def with_size(raw: bytes, suffix: str, width: int, height: int) -> bytes:
    """The header of a PNG, JPEG or BMP with another size, and the right sum."""
    if suffix == "png":
        ihdr = b"IHDR" + struct.pack(">2I", width, height) + raw[24:29]
        return raw[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + raw[33:]
    if suffix == "bmp":
        return raw[:18] + struct.pack("<2I", width, height) + raw[26:]
    at = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2")) + 5
    return raw[:at] + struct.pack(">2H", height % 2**16, width % 2**16) + raw[at + 4 :]


def without_palette(raw: bytes) -> bytes:
    at = raw.index(b"PLTE") - 4
    return raw[:at] + raw[at + 12 + int.from_bytes(raw[at : at + 4], "big") :]


def test_odd_images_become_pixels_or_are_named(tmp_path):
    rng, endings, wrong = random.Random(4), [], []
    for i, (suffix, mode, options) in enumerate(KINDS):
        whole = tmp_path / f"{i}.{suffix}"
        (PIXELS.convert("L").convert(mode) if mode == "I;16" else PIXELS.convert(mode)).save(whole, **options)
        cases = {f"{how} {n}": how for how in ("flipped", "truncated", "extended", "emptied") for n in range(3)}
        sizes = [(0, 9), (13, 0), (1, 1), (14, 10), (3000, 2000), (65535, 65535), (2**31 - 1, 9)] * (suffix != "webp")
        for case in ["whole", *cases, *sizes, *["no palette"] * ((suffix, mode) == ("png", "P"))]:
            path, raw = tmp_path / f"odd.{suffix}", whole.read_bytes()
            path.write_bytes(raw)
            if case in cases:
                damage(rng, path, cases[case])
            elif case == "no palette":
                path.write_bytes(without_palette(raw))
            elif case != "whole":
                path.write_bytes(with_size(raw, suffix, *case))
            for channels in (1, 3):
                began = time.process_time()
                try:
                    found = read_image(path, channels)
                    width, height = image_header(path)[0]
                    assert found.dtype == torch.uint8 and found.shape == (channels, height, width) and found.numel()
                    endings.append("pixels")
                except InputError as error:
                    endings.append("named")
                    assert str(path) in str(error) and "\n" not in str(error) and case != "whole"
                except Exception as error:
                    wrong.append((suffix, mode, options, case, repr(error)))
                assert time.process_time() - began < SOON, (suffix, mode, case)
    assert not wrong
    assert len(endings) > 500 and min(endings.count("pixels"), endings.count("named")) > 100
