"""Scores on disk: results.json (everything needed to repeat each number), results.csv and report.md."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from utils.checkpoint import write_atomically
from utils.errors import InputError

SCORES = ("fid", "isc", "kid", "precision", "recall", "f_score", "condition_accuracy", "bpd")


def cell_id(protocol: dict[str, Any]) -> str:
    """A hash of everything a score depends on."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The rows of OUT/results.json; a row is {id, label, n, extractor, scores, floor, protocol, ...}."""

    def __init__(self, out: Path) -> None:
        """Raises InputError where results.json can't be read."""
        self.out, self.rows = out, []
        path = out / "results.json"
        if path.exists():
            try:
                self.rows = json.loads(path.read_text())["rows"]
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(f"{path} can't be read: move it away or choose another --out") from None

    def find(self, identity: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["id"] == identity), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write all files; rows that another process has added meanwhile stay."""
        self.rows = [*Results(self.out).rows, row]
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / "results.json", lambda p: p.write_text(json.dumps({"rows": self.rows}, indent=1)))
        write_atomically(self.out / "results.csv", lambda p: p.write_text(to_csv(self.rows)))
        write_atomically(self.out / "report.md", lambda p: p.write_text(report(self.rows)))
        draw_sweep(self.rows, self.out / "score_vs_steps.png")
        draw_guidance(self.rows, self.out / "accuracy_vs_fid.png")
        if bounds := [row for row in self.rows if "terms" in row]:
            draw_terms(bounds, self.out / "bpd_terms.png")


def to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    names = ["label", "reference", "extractor", "n", *SCORES, "seconds_per_image"]
    writer = csv.DictWriter(text, names + [f"floor_{name}" for name in SCORES], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {name: row.get(name) for name in names} | row["scores"]
        flat |= {f"floor_{name}": value for name, value in (row["floor"] or {}).items()}
        writer.writerow({name: value for name, value in flat.items() if name in writer.fieldnames})
    return text.getvalue()


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in their seed alone, made one: means, with the standard deviation over the seeds as spread."""
    groups: dict[str, dict[Any, dict[str, Any]]] = {}
    for i, row in enumerate(rows):
        source = dict(row["protocol"].get("source", {}))
        seed = source.pop("seed", None)
        key = str(i) if seed is None else cell_id({**row["protocol"], "source": source})  # images of a folder have none
        groups.setdefault(key, {}).setdefault(seed, row)  # a seed that two processes have scored counts once
    merged = []
    for group in (list(by_seed.values()) for by_seed in groups.values()):
        first = group[0]
        if len(group) > 1:
            scores = {name: [row["scores"][name] for row in group] for name in SCORES if name in first["scores"]}
            means = {name: statistics.fmean(values) for name, values in scores.items()}
            spreads = {f"{name}_std": statistics.stdev(values) for name, values in scores.items()}
            times = [row["seconds_per_image"] for row in group if row.get("seconds_per_image")]
            first = first | {
                "label": f"{first['label'].rsplit(', seed ', 1)[0]}, ± over {len(group)} seeds",
                "scores": means | spreads,
                "seconds_per_image": statistics.fmean(times) if times else None,
            }
        merged.append(first)
    return merged


def report(rows: list[dict[str, Any]]) -> str:
    """The tables as markdown."""
    return "\n".join(f"{title}\n\n{markdown(table)}" for title, table in tables(rows))


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells with the header first) per reference, extractor and count, with the floor as last row."""
    parts, groups = [], {}
    for row in rows:
        hashes = (row["protocol"]["reference_sha256"], row["protocol"]["extractor_weights_sha256"])
        groups.setdefault((row["reference"], row["extractor"], row["n"], *hashes), []).append(row)
    for (reference, extractor, n, *_), group in groups.items():
        names = [name for name in SCORES if any(name in row["scores"] for row in group)]
        of = f"[{extractor}]" if extractor else ""  # bpd has none
        title = f"**{', '.join(f'{name}{of}@{n}' for name in names)}** against {reference}"
        full = _full_chain(group)
        cost = ["evaluations"] * any("evaluations" in row for row in group) + ["speed-up"] * (full is not None)
        table = [["images", *names, "ms per image", *cost]]
        for row in over_seeds(group):
            speed = f"{1000 * row['seconds_per_image']:.2f}" if row.get("seconds_per_image") else ""
            more = {"evaluations": str(row.get("evaluations", ""))}
            if full is not None and speed:
                more["speed-up"] = f"{full / row['seconds_per_image']:.1f}"
            cells = [_number(row["scores"], name) for name in names]
            table.append([row["label"], *cells, speed, *(more.get(name, "") for name in cost)])
        floor = next((row for row in group if row["floor"]), None)
        if floor:
            cells = [_number(floor["floor"], name) for name in names]
            table.append([f"floor: {floor['floor_label']}", *cells, "", *[""] * len(cost)])
        parts.append((title, table))
        parts += [(f"per class: {row['label']}", class_table(row["per_class"])) for row in group if "per_class" in row]
    return parts


def class_table(by_class: dict[str, dict[str, float]]) -> list[list[str]]:
    """The scores of each class, and their mean over classes."""
    names = [name for name in SCORES if name in next(iter(by_class.values()))]
    table = [["class", *names]]
    table += [[name, *(_number(values, score) for score in names)] for name, values in by_class.items()]
    means = {score: statistics.fmean(values[score] for values in by_class.values()) for score in names}
    return [*table, ["mean over classes", *(_number(means, score) for score in names)]]


def _full_chain(rows: list[dict[str, Any]]) -> float | None:
    """Mean seconds per image of the rows that visit every timestep, one network evaluation each."""
    timed = [row for row in rows if "total_steps" in row and row["seconds_per_image"]]
    full = [row["seconds_per_image"] for row in timed if row["evaluations"] == row["total_steps"]]
    return statistics.fmean(full) if full else None


def draw_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """The first score over network evaluations and over time per image, a line per sampler.

    Nothing for fewer than two step counts.
    """
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in over_seeds(rows):
        source = row["protocol"].get("source", {})
        if "timesteps" in source and row["extractor"]:
            name, value = next((name, row["scores"][name]) for name in SCORES if name in row["scores"])
            score = f"{name}[{row['extractor']}]@{row['n']} against {row['reference']}"
            hashes = (row["protocol"]["reference_sha256"][:6], source["weights_sha256"][:6])
            guidance = f"guidance {source.get('guidance_scale', 1):g}"
            line = (source["sampler"], source["skip_type"], f"eta {source['eta']:g}", score, guidance, *hashes)
            n = row.get("evaluations", len(source["timesteps"]))
            milliseconds = 1000 * row["seconds_per_image"] if row.get("seconds_per_image") else None
            point = {"n": n, "ms": milliseconds, "score": value, "spread": row["scores"].get(f"{name}_std", 0.0)}
            lines.setdefault(line, []).append(point)
    counts = sorted({point["n"] for points in lines.values() for point in points})
    if max((len({point["n"] for point in points}) for points in lines.values()), default=0) < 2:
        return
    varying = [i for i, values in enumerate(zip(*lines)) if len(set(values)) > 1]
    from matplotlib.figure import Figure

    timed = all(point["ms"] for points in lines.values() for point in points)
    figure = Figure(figsize=(12 if timed else 8, 4))
    axes = figure.subplots(1, 1 + timed, squeeze=False, sharey=True)[0]
    for axis, key, name in zip(axes, ("n", "ms"), ("network evaluations per image", "milliseconds per image")):
        for i, (line, points) in enumerate(lines.items()):
            label = ", ".join(line[i] for i in varying) or line[0]
            ordered = sorted(points, key=lambda point: point[key])
            x, values, spreads = zip(*((point[key], point["score"], point["spread"]) for point in ordered))
            style = ("-", "--", ":")[i // 10 % 3]  # matplotlib has ten colours
            axis.errorbar(x, values, spreads, marker="o", markersize=4, capsize=2, linestyle=style, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    few = counts if len(counts) < 8 else [n for n in counts if n in (10, 20, 50, 100, 200, 500, 1000)] or counts[::4]
    axes[0].set_xticks(few, map(str, few))
    axes[0].set_xticks([], minor=True)
    axes[0].set_ylabel(" / ".join(dict.fromkeys(line[3] for line in lines)), fontsize=8)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    write_atomically(path, lambda place: figure.savefig(place, dpi=110, format="png"))


def draw_guidance(rows: list[dict[str, Any]], path: Path) -> None:
    """The share of images that show what was asked over FID, a point per guidance scale; nothing for fewer than two."""
    lines: dict[tuple[Any, ...], dict[float, tuple[float, float]]] = {}
    for row in over_seeds(rows):
        if {"fid", "condition_accuracy"} <= row["scores"].keys():
            source = row["protocol"]["source"]
            line = (source["sampler"], f"{len(source['timesteps'])} {source['skip_type']} steps", row["n"],
                    row["reference"], source["weights_sha256"][:6])  # fmt: skip
            point = row["scores"]["fid"], row["scores"]["condition_accuracy"]
            lines.setdefault(line, {})[source["guidance_scale"]] = point
    if max(map(len, lines.values()), default=0) < 2:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for line, points in lines.items():
        scales = sorted(points)
        axis.plot(*zip(*(points[scale] for scale in scales)), "o-", markersize=4, label=", ".join(map(str, line[:2])))
        for scale in scales:
            axis.annotate(f"{scale:g}", points[scale], textcoords="offset points", xytext=(5, -9), fontsize=8)
    axis.set(xscale="log", xlabel=f"FID [{rows[-1]['extractor']}]@{rows[-1]['n']}, by guidance scale",
             ylabel="condition accuracy")  # fmt: skip
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    figure.tight_layout()
    write_atomically(path, lambda place: figure.savefig(place, dpi=110, format="png"))


def draw_terms(rows: list[dict[str, Any]], path: Path) -> None:
    """Every row's bound over the timesteps: its terms, and what they sum to from the data on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for row in rows:
        t, bits = row["terms"]["t"][::-1], row["terms"]["bits"][::-1]
        left.plot([i + 1 for i in t], bits, label=row["label"])
        right.plot([i + 1 for i in t], list(itertools.accumulate(bits)), label=f"{row['scores']['bpd']:.3f}")
    left.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="L_t [bits per dimension]")
    right.set(xscale="log", xlabel="t + 1", ylabel="sum of L_0 to L_t")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    write_atomically(path, lambda place: figure.savefig(place, dpi=110, format="png"))


def _number(values: dict[str, float], name: str) -> str:
    if name not in values:
        return ""
    spread = f" ± {values[name + '_std']:.2g}" if name + "_std" in values else ""
    return f"{values[name]:.4g}{spread}"


def markdown(table: list[list[str]]) -> str:
    """Rows of cells, the first the header -> an aligned markdown table."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"
