"""benchmarks/soak.py in a quick form: no more files and threads, and no more memory than what settles early."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks/soak.py")
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def test_slopes_are_per_10_000_steps_and_leave_the_warm_up_out():
    steps = list(range(0, 5000, 100))
    found = soak.slopes(steps, {"a": [999.0] * 10 + [3 + 2e-4 * step for step in steps[10:]]}, 1000)["a"]
    assert found["slope per 10,000 steps"] == pytest.approx(2)
    assert found["first"] == pytest.approx(3.2) and found["mean"] == pytest.approx(np.mean([3.2, 3 + 2e-4 * 4900]))


def test_nothing_grows_in_a_few_hundred_steps(tmp_path: Path) -> None:
    args = ["--train.evaluate_every", "null", "--train.mixed_precision", "no", "--train.valid_every", "25"]
    args += ["--train.sample_every", "25", "--train.save_every", "25", "--train.log_every", "5"]
    found = soak.soak(500, tmp_path / "soak", *args, every=0.1)
    series = json.loads((tmp_path / "soak/series.json").read_text())
    assert len(series["step"]) >= 20 and found["step time [ms]"]["mean"] > 0
    quarter = len(series["step"]) // 4
    grown = {name: np.median(y[-quarter:]) - np.median(y[quarter : 2 * quarter]) for name, y in series.items()}
    assert abs(grown["open files"]) <= 1 and abs(grown["threads"]) <= 1
    assert grown["memory [MiB]"] < 60  # what matplotlib and TensorBoard take when they are first used
