"""metrics.jsonl as curves: curves.png of a run folder, and SVG for its page."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

from utils.checkpoint import write_atomically

INK = "#010203"  # in the SVG, the colour that stands for the page's own text colour
COLOURS = ("#3b82c4", "#d9772b", "#3f9b52", "#b0518f", "#8a7a2f")  # readable on white and on black
MOST_POINTS = 600  # of a line in the SVG; a longer one is drawn as the means of as many stretches
SCORE = re.compile(r"\w+\[[\w.-]+\]@\d+")

Points = list[tuple[float, float]]  # (step, value)
Line = tuple[str, Points]  # with its label


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def panels(rows: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Title -> lines, of what metrics.jsonl holds; values that are no finite numbers are left out."""
    scores = sorted({name for row in rows for name in row if SCORE.fullmatch(name)})
    named = {
        "loss": [("loss", "train"), ("valid_loss", "validation, raw weights"), ("valid_loss_ema", "validation, EMA")],
        "lr": [("lr", "learning rate")],
        "grad_norm": [("grad_norm", "gradient norm before clipping")],
        "score": [(name, name) for name in scores],
    }
    found = {title: [(label, points(rows, name)) for name, label in names] for title, names in named.items()}
    found = {title: [line for line in lines if line[1]] for title, lines in found.items()}
    return {title: lines for title, lines in found.items() if lines}


def points(rows: list[dict[str, Any]], name: str) -> Points:
    """(step, value) of every row that has a finite number under `name`."""
    return [(row["step"], row[name]) for row in rows if _finite(row.get("step")) and _finite(row.get(name))]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw(axis, title: str, lines: list[Line]) -> None:
    for (label, pairs), colour in zip(lines, COLOURS * (1 + len(lines) // len(COLOURS))):
        axis.plot(*zip(*pairs), label=label, marker="." if len(pairs) < 30 else None, color=colour)
    axis.set_xlabel("optimizer step")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    if title == "loss" and all(value > 0 for _, pairs in lines for _, value in pairs):
        axis.set_yscale("log")
    axis.legend()


def draw_curves(run: Path) -> None:
    """curves.png: training and validation losses, learning rate and scores of metrics.jsonl over the steps."""
    from matplotlib.figure import Figure

    found = panels(read_metrics(run / "metrics.jsonl"))
    if not found:
        return
    figure = Figure(figsize=(5 * len(found), 3.6))
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, found.items()):
        _draw(axis, title, lines)
    figure.tight_layout()
    write_atomically(run / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def svg(title: str, lines: list[Line]) -> str:
    """A panel of `panels` as an <svg> element whose text and axes take the colour of the text around it."""
    import matplotlib
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style = dict.fromkeys(inks, INK) | {"svg.fonttype": "none", "svg.hashsalt": title, "legend.framealpha": 0}
    with matplotlib.rc_context(style | {"legend.edgecolor": "none", "font.size": 9}):
        figure = Figure(figsize=(5, 3.2))
        _draw(figure.subplots(), title, [(label, thinned(pairs)) for label, pairs in lines])
        figure.tight_layout()
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    text = text.getvalue()
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{title}-", text[text.index("<svg") :])  # ids are the whole page's
    return text.replace(INK, "currentColor")


def thinned(pairs: Points) -> Points:
    """At most MOST_POINTS of them: means over stretches of equally many."""
    if len(pairs) <= MOST_POINTS:
        return pairs
    width = -(-len(pairs) // MOST_POINTS)
    stretches = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    return [tuple(sum(column) / len(stretch) for column in zip(*stretch)) for stretch in stretches]
