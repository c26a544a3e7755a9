"""What the explorer does with uploads: bombs and broken files are refused before they are decoded."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from in_process import contents
from PIL import Image

from utils.errors import InputError
from utils.explorer.upload import MOST_BYTES, MOST_PIXELS, save_upload


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG that declares a size, whatever it holds."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(pixels)),
        (b"IEND", b""),
    ]
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return found


def bomb(name: str) -> bytes:
    if name == "pixels":
        return png(5000, MOST_PIXELS // 5000 + 1)
    if name == "huge":
        return png(60000, 60000)
    if name == "bytes":
        return bytes(MOST_BYTES + 1)
    if name == "line":
        return png(20_000_000, 1, bytes(20_000_001))
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(data, "PNG")
    return {"cut": data.getvalue()[:2000], "text": b"not an image", "none": b""}[name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pixels", "declares 5000x5001 pixels; at most 25,000,000"),
        ("huge", "3600000000 pixels"),
        ("bytes", "bytes; at most 10,485,760 are read"),
        ("cut", "can't be read"),
        ("text", "can't be read"),
        ("none", "can't be read"),
    ],
)
def test_bombs_are_refused_before_they_are_decoded(name: str, says: str, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb(name))
    if name in ("pixels", "huge", "bytes"):
        monkeypatch.setattr("utils.explorer.upload.decode", lambda *args: pytest.fail("it was decoded"))
    before = contents(tmp_path)
    with pytest.raises(InputError) as told:
        save_upload(str(file), tmp_path / "kept", 1, 8)
    assert says in str(told.value) and "bomb.png" in str(told.value) and str(tmp_path) not in str(told.value)
    assert contents(tmp_path) == before


def test_no_upload_and_a_line_of_pixels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image was uploaded"):
        save_upload(None, tmp_path, 1, 8)
    (tmp_path / "line.png").write_bytes(bomb("line"))  # resized by its shorter side it would have 1.3 billion pixels
    assert Image.open(save_upload(str(tmp_path / "line.png"), tmp_path, 3, 8) / "000000.png").size == (8, 8)
