"""evaluate_ddpm.py from the command line: a checkpoint and a folder give the same scores, on one and two processes."""

import csv
import json
from pathlib import Path

import pytest
from conftest import run

EVALUATE = ["--reference", "digits", "--feature_extractor", "dataset-classifier"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--evaluate.cache_dir", str(tmp_path_factory.mktemp("cache"))]


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_checkpoint_and_its_images_score_alike(tmp_path: Path, trained: Path, cache: list[str]) -> None:
    common = ["--weights", trained, "--sample.mixed_precision", "no"]
    done = run("evaluate_ddpm.py", *common, *EVALUATE, *cache, "--n_samples", 100, "--out", "one", cwd=tmp_path)
    assert "fid[dataset-classifier]@100" in done.stdout and "floor" in done.stdout
    assert "test accuracy" in done.stderr and "comparable" in done.stderr
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["report.md", "results.csv", "results.json"]
    run("evaluate_ddpm.py", *common, *EVALUATE, *cache, "--n_samples", 100, "--out", "two", cwd=tmp_path, processes=2)
    run("sample_ddpm.py", *common, "--n_samples", 100, "--save_dir", "images", cwd=tmp_path)
    args = ["--images", "images", *EVALUATE, *cache, "--data.name", "digits", "--data.valid_fraction", 0.9]
    done = run("evaluate_ddpm.py", *args, "--out", "three", cwd=tmp_path)
    assert "images: fid" in done.stderr and "of 0" not in done.stderr
    one, two, three = (rows(tmp_path / name)[0] for name in ("one", "two", "three"))
    assert set(one["scores"]) == {"fid", "isc", "isc_std", "kid", "kid_std", "precision", "recall", "f_score"}
    assert two["scores"] == pytest.approx(one["scores"], rel=0.02)  # a level of a pixel may differ between processes
    assert three["scores"] == pytest.approx(one["scores"], rel=1e-6)
    assert one["floor"]["fid"] < one["scores"]["fid"]
    assert one["protocol"]["reference"] == "digits:train" and one["n"] == 100
    table = list(csv.DictReader((tmp_path / "one/results.csv").open()))
    assert float(table[0]["fid"]) == one["scores"]["fid"]


def test_sweep_skips_cells_that_are_done(tmp_path: Path, trained: Path, cache: list[str]) -> None:
    args = ["--weights", trained, *EVALUATE, *cache, "--metrics", "fid", "--n_samples", 70, "--out", "out"]
    run("evaluate_ddpm.py", *args, "--samplers", "ddim", "--skip_steps", 4, 2, cwd=tmp_path)
    where = "; step000012 (EMA), seed 2022"
    labels = [f"ddim, {steps} trailing steps{where}" for steps in (2, 4)]
    assert [row["label"] for row in rows(tmp_path / "out")] == labels
    assert (tmp_path / "out/score_vs_steps.png").exists()
    done = run("evaluate_ddpm.py", *args, "--samplers", "ddim", "fixed_large", "--skip_steps", 2, cwd=tmp_path)
    assert f"{labels[0]}: already in" in done.stderr
    assert [row["label"] for row in rows(tmp_path / "out")][2:] == [f"fixed-large, 2 trailing steps{where}"]
    assert [set(row["scores"]) for row in rows(tmp_path / "out")] == [{"fid"}] * 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--reference", "digit"], ["digit", "did you mean digits"]),
        (["--reference", "digits:nope"], ["train, test, all"]),
        (["--reference", "digits", "--metrics", "fud"], ["fud", "did you mean fid"]),
        (["--reference", "digits", "--samplers", "ddmi"], ["ddmi", "did you mean ddim"]),
        (["--reference", "digits", "--skip_steps", "2000"], ["skip_steps", "1 to 1000"]),
        (["--reference", "digits", "--n_samples", "0"], ["n_samples", ">= 1"]),
        (["--reference", "digits", "--feature_extractor_weights", "nothing.pth"], ["nothing.pth", "no such file"]),
        ([], ["--reference"]),
    ],
)
def test_bad_input_is_told_before_anything_is_generated(
    tmp_path: Path, trained: Path, args: list[str], words: list[str]
) -> None:
    extractor = ["--feature_extractor", "inception-v3-compat"]
    done = run("evaluate_ddpm.py", "--weights", trained, *extractor, *args, "--out", "out", cwd=tmp_path, status=2)
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()
