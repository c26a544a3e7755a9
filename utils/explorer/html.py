"""What the page shows, as HTML that needs nothing from elsewhere: pictures are data URIs, small pixels stay squares."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

import torch.nn.functional as F
from torch import Tensor

from utils.errors import one_line
from utils.images import encode_png

WIDEST = 1024  # side of a picture on the page [pixels]; downloads are not reduced

SMALL = 400  # width up to which pixels stay squares when enlarged; wider ones are reduced, smoothly [pixels]

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; }
.panels { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.panel { flex: 1 1 240px; min-width: 0; max-width: 460px; margin: 0; }
.panel.wide { flex-basis: 100%; max-width: 100%; }
#point-picture .panel { max-width: 220px; }
.html-container:has(> .prose > .panels), #status .html-container, #status.html-container { padding: 0; }
textarea { font-variant-ligatures: none; }
.command textarea { font-family: var(--font-mono); font-size: 0.85em; }
.panel .above { font-weight: 600; margin-bottom: 6px; }
.panel img { display: block; width: 100%; height: auto; background: #fff;
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
.panel.small img { image-rendering: pixelated; }
.panel .beneath { margin-top: 6px; font-size: 0.9em; color: var(--body-text-color-subdued); }
.hint { border: 2px dashed var(--border-color-primary); border-radius: 8px; padding: 60px 20px; text-align: center;
  color: var(--body-text-color-subdued); }
.bar { height: 8px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); margin-bottom: 4px; }
.bar div { height: 100%; background: var(--color-accent); }
.said { font-variant-numeric: tabular-nums; }
.note { color: var(--body-text-color-subdued); }
.wrong { border-left: 4px solid #dc2626; background: rgba(220, 38, 38, 0.12); padding: 10px 14px; border-radius: 4px;
  overflow-wrap: anywhere; }
"""
HEAD = '<meta name="referrer" content="no-referrer">'
HINT = '<div class="hint">The pictures appear here.</div>'


def data_uri(picture: Tensor) -> str:
    """uint8 [C, H, W] as a PNG; above WIDEST pixels it is reduced."""
    if (side := max(picture.shape[-2:])) > WIDEST:
        size = [max(1, round(length * WIDEST / side)) for length in picture.shape[-2:]]
        picture = F.interpolate(picture[None].float(), size, mode="area")[0].round().byte()
    data = encode_png(picture, compression_level=1)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def panel(title: str, picture, caption: str = "") -> str:
    """picture: uint8 [C, H, W], or a function that makes it."""
    picture = picture() if callable(picture) else picture
    height, width = picture.shape[-2:]
    kind = "panel" + " wide" * (width > 3 * height) + " small" * (width <= SMALL)
    words = (f'<div class="{name}">{escape(text)}</div>' if text else "" for name, text in
             (("above", title), ("beneath", caption)))  # fmt: skip
    above, beneath = words
    image = f'<img src="{data_uri(picture)}" alt="{escape(title, quote=True)}">'
    return f'<figure class="{kind}">{above}{image}{beneath}</figure>'


def panels(shown: Iterable) -> str:
    """Panels (title, picture, caption) side by side, a hint where there are none."""
    found = "".join(panel(item.title, item.picture, item.caption) for item in shown)
    return f'<div class="panels">{found}</div>' if found else HINT


def progress(share: float, text: str) -> str:
    """share: 0 to 1."""
    bar = f'<div class="bar"><div style="width: {100 * share:.1f}%"></div></div>'
    return f'{bar}<div class="said" role="status">{escape(text)}</div>'


def said(text: str, notes: Iterable[str] = ()) -> str:
    lines = "".join(f'<div class="note">{escape(note)}</div>' for note in notes)
    return f'<div class="said" role="status">{escape(text)}</div>{lines}'


def wrong(text: str) -> str:
    """An error line."""
    return f'<div class="wrong" role="alert">error: {escape(one_line(text))}</div>'
