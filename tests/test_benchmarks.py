"""benchmarks/ runs: a speed comparison in miniature through its command line, and what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment


def test_speed_measures_and_compares(tmp_path: Path) -> None:
    contestants = ["ours", "plain loop"]
    tasks = ["train", "sample", "fixed-small"]
    command = [sys.executable, ROOT / "benchmarks/speed.py", "--preset", "digits", "--tasks", *tasks]
    command += ["--rounds", "1", "--units", "1", "--batch_size", "4", "--steps", "2"]
    command += ["--contestants", *contestants, "--out", tmp_path / "out" / "speed.json"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    rows = {(row["task"], row["name"]): row for row in found["rows"]}
    assert set(rows) == {(task, name) for task in tasks for name in contestants}
    assert all(0 < row["lowest"] <= row["per_second"] <= row["highest"] for row in rows.values())
    assert all(row["first"] > 0 and row["peak_mib"] > 50 for row in rows.values())
    assert found["gflop"]["ours"] == found["gflop"]["plain loop"] and found["ceiling"]["fp32"] > 0
    for (task, name), row in rows.items():  # the ratio that is printed is that of the medians
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {task}, {name} |")]
        ratio = rows[task, "ours"]["per_second"] / row["per_second"]
        assert float(re.search(r"([\d.]+) x", line)[1]) == round(ratio, 2)
    assert "images/s by 1000 steps of fixed-small" in done.stdout and "by 50 steps of ddim" in done.stdout


def test_a_contestant_that_fails_ends_the_comparison_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "denoising_diffusion_pytorch.py").write_text("raise ImportError('broken on purpose')\n")
    command = [sys.executable, ROOT / "benchmarks/speed.py", "--preset", "digits", "--contestants", "lucidrains"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "lucidrains failed" in done.stderr and "broken on purpose" in done.stderr
