"""Grids with words: a line under each image, a title beside each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.images import enlarge

FONT_SIZE, LINE, GAP = 12, 15, 4  # pixels
SMALLEST = 64  # side of an image in the grid [pixels]
WIDEST = 160  # a title beside a row


def captioned_grid(
    rows: Sequence[Sequence[Tensor]], beneath: Sequence[Sequence[str]] = (), beside: Sequence[str] = ()
) -> Tensor:
    """Rows of uint8 images [C, H, W] of one size -> a picture [C, H', W'] in black on white.

    beneath: for each row, or only the first ones or the last, a text under each of its images, in at most two lines;
    an empty list leaves no room. beside: a title left of each row. What is too long ends in an ellipsis.
    """
    first = enlarge(rows[0][0], SMALLEST)
    channels, height, width = first.shape
    font = ImageFont.load_default(FONT_SIZE)
    titles = [_fitted(title, font, WIDEST, 3) for title in beside]
    left = max((font.getlength(line) for lines in titles for line in lines), default=-GAP)
    left = int(left) + 2 * GAP
    texts = [[_fitted(text, font, width + GAP, 2) for text in row] for row in beneath] or [[] for _ in rows]
    room = [LINE * max((len(lines) for lines in row), default=0) for row in texts]
    n_columns = max(map(len, rows))
    size = left + n_columns * (width + GAP), GAP + sum(height + GAP + below for below in room)
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw, top = ImageDraw.Draw(canvas), GAP
    for i, row in enumerate(rows):
        if titles:
            middle = top + (height - LINE * len(titles[i])) // 2
            draw.multiline_text((GAP, middle), "\n".join(titles[i]), "black", font, spacing=LINE - FONT_SIZE)
        for j, image in enumerate(row):
            x = left + j * (width + GAP)
            pixels = enlarge(image, SMALLEST).permute(1, 2, 0).squeeze(-1).numpy()
            canvas.paste(Image.fromarray(pixels), (x, top))
            for k, line in enumerate(texts[i][j] if texts[i] else ()):
                x_line = x + (width - font.getlength(line)) / 2
                draw.text((x_line, top + height + k * LINE), line, "black", font)
        top += height + GAP + room[i]
    data = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return data.view(size[1], size[0], channels).permute(2, 0, 1).contiguous()


def _fitted(text: str, font, width: float, most: int) -> list[str]:
    """The words of a text in at most so many lines of at most so many pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
