"""evaluate_ddpm.py over seeds, skip types and etas, and its bits per dimension, which need no generated images.

The network is not trained; everything here holds for any network.
"""

import csv
import json
import statistics
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from in_process import call, on_two_processes, random_weights, refused

from diffusions import build_process, time_grid
from diffusions.generate import denoiser
from diffusions.likelihood import bound_terms
from diffusions.noise import randn
from diffusions.pixels import to_unit
from evaluate_ddpm import main
from utils import classifier, sweep
from utils.data import load_splits
from utils.results import over_seeds, report
from utils.weights import load_network, open_weights

T = 20
N = 64  # as many images as the classifier has features


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    random_weights(folder / "fixed")
    random_weights(folder / "learned", diffusion__learn_variance=True)
    return folder


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "N_STEPS", 30)


def arguments(inputs: Path, *args: object, kind: str = "fixed") -> list[object]:
    common = ["--weights", inputs / kind / "net.safetensors", "--reference", "digits", "--n_samples", N]
    extractor = ["--feature_extractor", "dataset-classifier", "--evaluate.cache_dir", inputs / "cache"]
    return [*common, *extractor, "--out", "out", *args]


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "out/results.json").read_text())["rows"]


def cells_of_report(text: str, label: str) -> list[str]:
    """The cells of the one table row that says `label`."""
    (line,) = [line for line in text.splitlines() if label in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- which cells there are ---


def cells(**axes: list[str]) -> list[tuple]:
    options = Namespace(**{name: axes.get(name) for name in sweep.AXES})
    return [tuple(cell.values()) for cell in sweep.cells(options, [])]


def test_a_sweep_is_a_product_with_etas_for_ddim_alone() -> None:
    assert cells() == [()]
    assert cells(samplers=["heun", "ddim"], skip_steps=["null", "10", "5"]) == [
        *(("heun", "5"), ("ddim", "5"), ("heun", "10"), ("ddim", "10")),
        *(("heun", "null"), ("ddim", "null")),
    ]
    assert cells(samplers=["ddim", "fixed_small"], skip_types=["uniform", "quad"], etas=["0", "0.5"]) == [
        *(("ddim", "uniform", "0"), ("ddim", "uniform", "0.5"), ("ddim", "quad", "0"), ("ddim", "quad", "0.5")),
        *(("fixed_small", "uniform"), ("fixed_small", "quad")),
    ]
    assert cells(etas=["0", "1"]) == [("0",), ("1",)]


# --- over seeds ---


def row(seed: int, fid: float, steps: int = 5, seconds: float | None = 0.5, **protocol: object) -> dict:
    source = {"sampler": "ddim", "timesteps": list(range(steps)), "seed": seed}
    protocol = {"source": source, "reference_sha256": "r", "extractor_weights_sha256": "e", **protocol}
    return {
        "label": f"ddim, {steps} steps; run (EMA), seed {seed}",
        "reference": "digits:train",
        "extractor": "classifier",
        "n": 100,
        "scores": {"fid": fid, "isc": 2.0, "isc_std": 0.1},
        "floor": None,
        "floor_label": "",
        "seconds_per_image": seconds,
        "protocol": protocol,
    }


def test_rows_of_other_seeds_become_one() -> None:
    (merged,) = over_seeds([row(1, 10.0, seconds=None), row(2, 14.0, seconds=0.2), row(5, 12.0, seconds=0.4)])
    assert merged["scores"] == pytest.approx({"fid": 12, "fid_std": 2, "isc": 2, "isc_std": 0})
    assert merged["label"] == "ddim, 5 steps; run (EMA), ± over 3 seeds"
    assert merged["seconds_per_image"] == pytest.approx(0.3)


def test_rows_that_differ_in_more_stay_apart() -> None:
    alone = [row(1, 10.0), row(2, 11.0, steps=6), row(3, 12.0, n=7), row(4, 13.0, metrics=["fid"])]
    folder = row(1, 14.0) | {"label": "images", "protocol": {"source": {"images_sha256": "x"}}}
    assert over_seeds([*alone, folder]) == [*alone, folder]
    assert [len(over_seeds([*alone, row(9, 10.0, steps=steps)])) for steps in (5, 6, 7)] == [4, 4, 5]


def test_one_seed_twice_is_no_spread() -> None:
    """Two evaluations at the same time may both add a row."""
    assert len(over_seeds([row(1, 10.0), row(1, 10.0)])) == 1
    assert "±" not in over_seeds([row(1, 10.0), row(1, 10.0)])[0]["label"]
    merged = over_seeds([row(1, 10.0), row(1, 10.0), row(2, 14.0)])[0]
    assert merged["label"].endswith("± over 2 seeds") and merged["scores"]["fid"] == pytest.approx(12)


def test_the_report_shows_the_spread() -> None:
    text = report([row(1, 10.0), row(2, 14.0), row(1, 20.0, steps=6)])
    assert cells_of_report(text, "± over 2 seeds")[1:] == ["12 ± 2.8", "2 ± 0", "500.00"]
    assert cells_of_report(text, "6 steps")[1:] == ["20", "2 ± 0.1", "500.00"]


# --- from the command line ---


def test_repeats_are_seeds(inputs: Path, tmp_path: Path) -> None:
    args = arguments(inputs, "--metrics", "fid", "isc", "--samplers", "ddim", "--skip_steps", 2)
    call(main, *args, "--repeats", 2, cwd=tmp_path)
    first = rows(tmp_path)
    done = call(main, *args, "--repeats", 3, cwd=tmp_path)
    found = rows(tmp_path)
    assert [row["protocol"]["source"]["seed"] for row in found] == [2022, 2023, 2024]
    assert [row["label"].rpartition(", ")[2] for row in found] == ["seed 2022", "seed 2023", "seed 2024"]
    assert found[:2] == first and done.stderr.count("already in") == 2
    fids = [row["scores"]["fid"] for row in found]
    assert len(set(fids)) == 3
    expected = f"{statistics.fmean(fids):.4g} ± {statistics.stdev(fids):.2g}"
    text = (tmp_path / "out/report.md").read_text()
    assert cells_of_report(text, "± over 3 seeds")[1] == expected and text in done.stdout
    done = call(main, *args, "--seed", 2023, cwd=tmp_path)
    assert "already in" in done.stderr and rows(tmp_path) == found, "a repeat is the plain evaluation of its seed"


def test_sweep_over_skip_types_and_etas(inputs: Path, tmp_path: Path) -> None:
    axes = ["--samplers", "ddim", "fixed_small", "--skip_types", "uniform", "quad", "--etas", 0, 0.5]
    call(main, *arguments(inputs, "--metrics", "fid", "--skip_steps", 3, *axes), cwd=tmp_path)
    found = [(source["sampler"], source["skip_type"], source["eta"]) for source in sources(tmp_path)]
    assert found == [
        *(("ddim", "uniform", 0.0), ("ddim", "uniform", 0.5), ("ddim", "quad", 0.0), ("ddim", "quad", 0.5)),
        *(("fixed-small", "uniform", 0.0), ("fixed-small", "quad", 0.0)),
    ]
    assert len({row["scores"]["fid"] for row in rows(tmp_path)}) == 6
    assert [tuple(source["timesteps"]) for source in sources(tmp_path)][::2] == [(13, 6, 0), (16, 4, 0), (13, 6, 0)]
    labels = [row["label"].partition(";")[0] for row in rows(tmp_path)]
    assert labels[1] == "ddim, 3 uniform steps, eta 0.5" and labels[5] == "fixed-small, 3 quad steps"


def sources(folder: Path) -> list[dict]:
    return [row["protocol"]["source"] for row in rows(folder)]


def bits_per_dimension(path: Path, n: int, variance: str, seed: int) -> torch.Tensor:
    """[T + 1, n], by hand: image i of n, evenly spaced among the training digits, with noise of index i's own row."""
    weights = open_weights(str(path), None, [])
    train = load_splits(weights.config.data)["train"]
    indices = torch.tensor([i * len(train) // n for i in range(n)])
    x0 = to_unit(torch.stack([train[i] for i in indices.tolist()]))
    process = build_process(weights.config.diffusion)
    denoise, draws = denoiser(load_network(weights, "cpu"), process, clip=True), iter(range(T))
    noise = lambda: randn(seed, indices, next(draws), (1, 8, 8))
    return bound_terms(denoise, x0, time_grid(process.alpha_bar, "uniform", None), variance, noise)


def test_bits_per_dimension(inputs: Path, tmp_path: Path) -> None:
    args = arguments(inputs, "--metrics", "bpd", "--n_samples", 10, "--seed", 5)
    call(main, *args, "--samplers", "ddim", "--evaluate.cache_dir", tmp_path / "cache", cwd=tmp_path)
    done = call(main, *args, "--samplers", "fixed-large", "ddim", "fixed-small", "--micro_batch", 3, cwd=tmp_path)
    small, large = rows(tmp_path)
    assert not (tmp_path / "cache").exists(), "no extractor is needed"
    assert done.stderr.count("already there") == 1, "ddim has no bound: fixed-small stands for it, and was there"
    for found, variance in [(small, "small"), (large, "large")]:
        expected = bits_per_dimension(inputs / "fixed/net.safetensors", 10, variance, 5)
        terms, scores = found["terms"], found["scores"]
        assert found["protocol"]["source"]["sampler"] == f"fixed-{variance}" and found["n"] == 10
        assert terms["t"] == list(range(T - 1, -1, -1)) and len(terms["bits"]) == T
        assert [*terms["bits"], terms["prior"]] == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
        assert scores["bpd"] == pytest.approx(sum(terms["bits"]) + terms["prior"], rel=1e-9)
        assert scores["bpd_decoder"] == terms["bits"][-1] and scores["bpd_prior"] == terms["prior"]
        spread = expected.sum(0).std().item() / 10**0.5  # the standard error of the mean
        assert scores["bpd_std"] == pytest.approx(spread, rel=1e-3)
        shown = cells_of_report(done.stdout, f"fixed-{variance}")[1]
        assert shown == f"{scores['bpd']:.4g} ± {scores['bpd_std']:.2g}"
    assert "**bpd@10** against digits:train" in done.stdout and (tmp_path / "out/bpd_terms.png").exists()
    table = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [float(line["bpd"]) for line in table] == [row["scores"]["bpd"] for row in (small, large)]


def test_bpd_of_a_network_that_learns_its_variance(inputs: Path, tmp_path: Path) -> None:
    call(main, *arguments(inputs, "--metrics", "bpd", "--n_samples", 4, kind="learned"), cwd=tmp_path)
    (found,) = rows(tmp_path)
    assert found["protocol"]["source"]["sampler"] == "learned-range"
    expected = bits_per_dimension(inputs / "learned/net.safetensors", 4, "learned", 2022)
    assert found["scores"]["bpd"] == pytest.approx(expected.sum(0).mean().item(), rel=1e-4)


def test_repeats_of_bpd(inputs: Path, tmp_path: Path) -> None:
    done = call(main, *arguments(inputs, "--metrics", "bpd", "--n_samples", 4, "--repeats", 2), cwd=tmp_path)
    values = [row["scores"]["bpd"] for row in rows(tmp_path)]
    assert [source["seed"] for source in sources(tmp_path)] == [2022, 2023] and values[0] != values[1]
    expected = f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}"
    assert cells_of_report(done.stdout, "± over 2 seeds")[1] == expected


def test_bpd_beside_other_metrics(inputs: Path, tmp_path: Path) -> None:
    done = call(main, *arguments(inputs, "--metrics", "bpd", "fid", "--skip_steps", 2), cwd=tmp_path)
    bound, image = rows(tmp_path)
    assert "bpd" in bound["scores"] and "fid" not in bound["scores"] and bound["n"] == N
    assert set(image["scores"]) == {"fid"} and image["protocol"]["metrics"] == ["fid"]
    assert "**bpd@64**" in done.stdout and "**fid[dataset-classifier]@64**" in done.stdout


def test_bpd_on_two_processes(inputs: Path, tmp_path: Path) -> None:
    """An odd count, and a micro-batch that does not divide a share; more images than there are is all of them."""
    args = arguments(inputs, "--metrics", "bpd", "--n_samples", 7)
    (tmp_path / "one").mkdir()
    call(main, *args, cwd=tmp_path / "one")
    on_two_processes(
        tmp_path,
        ["evaluate_ddpm.py", *args, "--micro_batch", 3],
        ["evaluate_ddpm.py", *args, "--n_samples", 1000, "--seed", 3],
    )
    (one,), (two, whole) = rows(tmp_path / "one"), rows(tmp_path)
    assert two["id"] == one["id"] and two["circumstances"]["processes"] == 2
    assert two["scores"] == pytest.approx(one["scores"], rel=1e-4)
    assert two["terms"]["bits"] == pytest.approx(one["terms"]["bits"], rel=1e-4)
    assert whole["n"] == 180


# --- wrong input ---

WEIGHTS = "--weights {inputs}/fixed/net.safetensors --reference digits"
REFUSED = [
    (f"{WEIGHTS} --etas 2", ["sample.eta = '2'", "<= 1"]),
    (f"{WEIGHTS} --etas 0 x", ["sample.eta = 'x'"]),
    (f"{WEIGHTS} --etas 0.5 --sample.sampler fixed-small", ["eta", "fixed-small", "ignores"]),
    (f"{WEIGHTS} --samplers heun fixed-small --sample.eta 0.5", ["eta", "ignores"]),
    (f"{WEIGHTS} --samplers heun fixed_small --etas 0 0.5", ["--etas", "heun, fixed-small", "ddim"]),
    (f"{WEIGHTS} --skip_types uniform foo", ["sample.skip_type = 'foo'", "logsnr"]),
    (f"{WEIGHTS} --skip_types", ["--skip_types"]),
    (f"{WEIGHTS} --samplers ddim --sample.sampler ddim", ["--samplers", "--sample.sampler", "same option"]),
    (f"{WEIGHTS} --etas 0.5 --sample.eta 0.5", ["--etas", "--sample.eta", "same option"]),
    (f"{WEIGHTS} --skip_types quad --sample.skip_type quad", ["--skip_types", "--sample.skip_type", "same option"]),
    (f"{WEIGHTS} --skip_steps 5 --sample.skip_steps 5", ["--skip_steps", "--sample.skip_steps", "same option"]),
    (f"{WEIGHTS} --samplers learned-range", ["learned-range", "learn_variance"]),
    (f"{WEIGHTS} --skip_steps 5 21", ["skip_steps = 21", "1 to 20"]),
    (f"{WEIGHTS} --repeats 0", ["--repeats", "'0'"]),
    (f"{WEIGHTS} --metrics bpd fud", ["fud", "did you mean fid"]),
    ("--images {inputs} --reference digits --metrics bpd", ["bpd", "--weights"]),
    ("--images {inputs} --reference digits --repeats 2", ["--repeats", "--weights"]),
    ("--images {inputs} --reference digits --etas 0", ["--etas", "--weights"]),
    ("--images {inputs} --reference digits --skip_types quad", ["--skip_types", "--weights"]),
]


@pytest.mark.parametrize(("line", "says"), REFUSED, ids=[line for line, _ in REFUSED])
def test_wrong_input_ends_in_one_line(inputs: Path, tmp_path: Path, line: str, says: list[str]) -> None:
    refused(main, *line.format(inputs=inputs).split(), "--out", "out", cwd=tmp_path, says=says)
