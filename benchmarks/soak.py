"""Train many tiny steps with previews, validation, scores and checkpoints on; see from outside whether anything grows.

    python benchmarks/soak.py [--steps 50000] [--workers N] [--out DIR]

Prints the slope of memory, open files, threads and step time over the steps after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--model.dim", "8", "--model.norm_groups", "4", "--model.dim_mults", "[1]", "--model.num_res_blocks", "1"),
    *(
        "--model.attn_resolutions",
        "[]",
        "--train.batch_size",
        "4",
        "--train.n_samples",
        "4",
        "--sample.skip_steps",
        "3",
    ),
    *(
        "--train.n_valid",
        "16",
        "--train.valid_every",
        "250",
        "--train.sample_every",
        "500",
        "--train.save_every",
        "250",
    ),
    *(
        "--train.evaluate_every",
        "5000",
        "--train.n_evaluate",
        "100",
        "--train.log_every",
        "50",
        "--train.keep_last",
        "2",
    ),
]


def usage(pid: int) -> dict[str, float]:
    """Resident memory [MiB], open files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "memory [MiB]": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"}") else 0


def slopes(steps: list[int], series: dict[str, list[float]], from_step: int) -> dict[str, dict[str, float]]:
    """Least-squares slope per 10,000 steps of each series after `from_step`, with its mean there."""
    kept = [i for i, step in enumerate(steps) if step >= from_step]
    x = np.array(steps)[kept] / 10_000
    fits = {name: (np.polyfit(x, np.array(y)[kept], 1)[0], np.array(y)[kept]) for name, y in series.items()}
    return {
        name: {
            "mean": float(y.mean()),
            "first": float(y[0]),
            "last": float(y[-1]),
            "slope per 10,000 steps": float(slope),
        }
        for name, (slope, y) in fits.items()
    }


def soak(n_steps: int, out: Path, *args: str, every: float = 1.0) -> dict[str, dict[str, float]]:
    """Train n_steps in `out`/run; returns the slopes."""
    out.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "train_ddpm.py"), "-e", str(out / "run"), *TINY, *args]
    command += ["--train.n_steps", str(n_steps)]
    with open(out / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        steps, found = [], []
        while process.poll() is None:
            try:
                now = usage(process.pid)
            except (FileNotFoundError, KeyError):  # it has just ended
                break
            step = last_step(out / "run/metrics.jsonl")
            if 0 < step < n_steps:
                steps.append(step)
                found.append(now)
            time.sleep(every)
    if process.wait():
        raise SystemExit((out / "log.txt").read_text()[-3000:])
    series = {name: [row[name] for row in found] for name in found[0]}
    (out / "series.json").write_text(json.dumps({"step": steps, **series}))
    result = slopes(steps, series, n_steps // 10)
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "images_per_second" in row]
    took = {"step time [ms]": [4 / row["images_per_second"] * 1000 for row in rows]}
    return result | slopes([row["step"] for row in rows], took, n_steps // 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="read images by N worker processes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/soak")
    options = parser.parse_args()
    args = ["--data.cache", "false", "--data.num_workers", str(options.workers)] if options.workers else []
    result = soak(options.steps, options.out.resolve(), *args)
    (options.out / "soak.json").write_text(json.dumps(result, indent=1))
    for name, row in result.items():
        print(f"{name:14}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
