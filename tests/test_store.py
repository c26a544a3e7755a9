"""evaluate_ddpm.py --store and --verify, and precision/recall with kept radii. The networks are not trained."""

import csv
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import call, fork, forked, random_weights, refused
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluate_ddpm import main
from utils import classifier, scoring
from utils.precision_recall import precision_recall

N, CHUNK = 70, 8  # the last chunk is not full


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    random_weights(folder / "fixed")
    return folder


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "N_STEPS", 30)


def arguments(inputs: Path, *args: object, n: int = N) -> list[object]:
    common = ["--weights", inputs / "fixed/net.safetensors", "--reference", "digits", "--n_samples", n]
    extractor = ["--feature_extractor", "dataset-classifier", "--evaluate.cache_dir", inputs / "cache"]
    return [*common, *extractor, "--out", "out", *args]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "out/results.json").read_text())["rows"]


def without_times(folder: Path) -> tuple[str, str, list]:
    """report.md, results.csv and the rows; what was measured with a clock is left out."""
    report = [re.sub(r"\s+", " ", line).split("|") for line in (folder / "out/report.md").read_text().splitlines()]
    timed = next((row.index(" ms per image ") for row in report if " ms per image " in row), None)
    report = [[cell for i, cell in enumerate(row) if i != timed and not set(cell) <= set("- ")] for row in report]
    found = [{key: value for key, value in row.items() if key != "seconds_per_image"} for row in rows(folder)]
    table = list(csv.DictReader((folder / "out/results.csv").open()))
    return str(report), str([row | {"seconds_per_image": ""} for row in table]), found


def slowly() -> None:
    """Make each micro-batch last, so that kills fall inside cells."""
    from utils import scoring

    original = scoring.generate_fitting

    def slow(*args: object, **more: object):
        for batch in original(*args, **more):
            time.sleep(0.15)
            yield batch

    scoring.generate_fitting = slow


def made(folder: Path) -> int:
    """Chunks that there are."""
    return len(list((folder / "store").glob("*/*.npy")))


def test_a_compiled_network_meets_one_batch_size_in_a_store(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the last chunk, alone or not: after a kill it is made as before it."""
    sizes: list[int] = []

    def load(*args: object):
        net = load_network(*args)
        net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        net._compiled_call_impl = net._call_impl  # as nn.Module.compile leaves it
        return net

    load_network = scoring.load_network
    monkeypatch.setattr(scoring, "load_network", load)
    args = arguments(inputs, "--micro_batch", CHUNK, "--store", "store", "--metrics", "fid", "--force", n=3 * CHUNK - 2)
    call(main, *args, cwd=tmp_path)
    (first,) = rows(tmp_path)
    assert set(sizes) == {CHUNK}
    for path in [*sorted((tmp_path / "store").glob("*/*"))[-2:], tmp_path / "out/results.json"]:
        path.unlink()
    sizes.clear()
    call(main, *args, cwd=tmp_path)
    assert set(sizes) == {CHUNK} and rows(tmp_path)[0]["scores"] == first["scores"]


def test_killed_ten_times_and_continued_it_ends_with_the_same_report(inputs: Path, tmp_path: Path) -> None:
    axes = ["--samplers", "ddim", "fixed-small", "--skip_steps", 2, 3, "--micro_batch", CHUNK, "--store", "store"]
    args = arguments(inputs, *axes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    forked(main, *args, cwd=whole)
    rng, inside, deaths = random.Random(0), 0, 0
    for _ in range(10):
        pid = fork(main, args, killed, killed / "log", slowly)
        before, patience = made(killed), time.monotonic() + 60
        while made(killed) == before and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        deaths += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        inside += made(killed) % -(-N // CHUNK) > 0
    forked(main, *args, cwd=killed)
    assert deaths == 10 and inside >= 5, "kills that fall beside the work prove nothing"
    assert without_times(killed) == without_times(whole)
    assert len(rows(killed)) == 4


def test_a_stored_cell_scores_like_one_in_memory_and_holds_the_images(inputs: Path, tmp_path: Path) -> None:
    args = arguments(inputs, "--skip_steps", 2, "--micro_batch", CHUNK)
    call(main, *args, "--store", tmp_path / "store", cwd=tmp_path)
    (stored,) = rows(tmp_path)
    (tmp_path / "plain").mkdir()
    call(main, *args, cwd=tmp_path / "plain")
    (plain,) = rows(tmp_path / "plain")
    assert stored["id"] == plain["id"] and stored["scores"] == pytest.approx(plain["scores"], rel=1e-6)
    (cell,) = (tmp_path / "store").iterdir()
    files = sorted(cell.glob("*.npy"))
    assert [int(path.name[:8]) for path in files] == list(range(0, N, CHUNK))
    assert sum(len(np.load(path)) for path in files) == N


@pytest.mark.parametrize("end", ["images.npy", "safetensors"])
def test_what_is_damaged_or_too_short_is_made_again(inputs: Path, tmp_path: Path, end: str) -> None:
    args = arguments(inputs, "--skip_steps", 2, "--micro_batch", CHUNK, "--store", "store")
    call(main, *args, cwd=tmp_path)
    (first,) = rows(tmp_path)
    for path in (tmp_path / "store").glob(f"*/*{end}"):
        path.write_bytes(path.read_bytes()[:100])
        if end == "images.npy":  # the features would stand for them
            for features in path.parent.glob("*.safetensors"):
                features.unlink()
    (tmp_path / "out/results.json").unlink()
    call(main, *args, cwd=tmp_path)
    assert rows(tmp_path)[0]["scores"] == first["scores"]


def test_a_stored_cell_grows(inputs: Path, tmp_path: Path) -> None:
    args = arguments(inputs, "--skip_steps", 2, "--micro_batch", CHUNK, "--store", "store")
    call(main, *args, cwd=tmp_path)
    call(main, *args[:5], 77, *args[6:], cwd=tmp_path)
    (tmp_path / "fresh").mkdir()
    call(main, *args[:5], 77, *args[6:], cwd=tmp_path / "fresh")
    assert rows(tmp_path)[1]["scores"] == rows(tmp_path / "fresh")[0]["scores"]
    assert len(list((tmp_path / "store").iterdir())) == 1


@pytest.mark.parametrize("n", [131, pytest.param(50_001, marks=pytest.mark.slow)])
def test_every_index_once_and_the_same_score_on_1_2_and_3_processes(inputs: Path, tmp_path: Path, n: int) -> None:
    args = arguments(inputs, "--skip_steps", 1, "--store", "store", "--metrics", "fid", "isc", "kid", n=n)
    found = []
    for processes in (1, 2, 3):
        place = tmp_path / str(processes)
        place.mkdir()
        forked(main, *args, cwd=place, processes=processes)
        (row,) = rows(place)
        assert row["circumstances"]["processes"] == processes
        found.append(row["scores"])
        files = sorted((place / "store").glob("*/*.npy"))
        spans = [(int(path.name[:8]), len(np.load(path, mmap_mode="r"))) for path in files]
        assert [i for start, count in spans for i in range(start, start + count)] == list(range(n))
    assert found[0] == found[1] == found[2]


# --- verify ---


def test_results_are_verified(inputs: Path, tmp_path: Path) -> None:
    args = arguments(inputs, "--samplers", "ddim", "fixed-small", "--skip_steps", 2, "--metrics", "fid", "kid", "bpd")
    call(main, *args, "--n_samples", 64, cwd=tmp_path)
    done = call(main, "--verify", "out/results.json", cwd=tmp_path)
    assert done.stdout.count("| same") == 2 * 3 + 4, done.stdout
    assert "3 rows, all agree" in done.stderr
    forked(main, "--verify", "out/results.json", cwd=tmp_path, processes=2)
    path = tmp_path / "out/results.json"
    stored = json.loads(path.read_text())
    stored["rows"][1]["scores"]["fid"] *= 1.5
    stored["rows"][2]["id"] = "another"
    path.write_text(json.dumps(stored))
    done = call(main, "--verify", "out/results.json", cwd=tmp_path, status=1)
    assert done.stdout.count("DIFFERS") == 1 and "protocol differs" in done.stdout and "NOT all agree" in done.stderr


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"rows": [{"label": "x"}]}', '{"rows": 3}'])
def test_what_cannot_be_verified_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    refused(main, "--verify", "results.json", cwd=tmp_path, says=["--verify results.json"])


def test_a_store_goes_with_weights(inputs: Path, tmp_path: Path) -> None:
    refused(
        main, "--images", inputs, "--reference", "digits", "--store", "x", cwd=tmp_path, says=["--store", "weights"]
    )
    (tmp_path / "file").write_text("")
    args = arguments(inputs, "--skip_steps", 1, "--store", "file")
    assert "--store file can't be written" in call(main, *args, cwd=tmp_path, status=2).stderr


# --- precision and recall ---


def test_precision_and_recall_are_torch_fidelitys_also_from_the_cache(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(n, 7, generator=generator) + shift for n, shift in ((300, 0), (200, 0.7)))
    expected = prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)
    first = precision_recall(generated, real, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert first == expected == precision_recall(generated, real, tmp_path) == precision_recall(generated, real)
    assert 0 < expected["precision"] < 1
    precision_recall(generated, real + 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "other features have other balls"
    kept.write_bytes(b"")
    assert precision_recall(generated, real, tmp_path) == expected
