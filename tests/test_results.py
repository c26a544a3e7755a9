"""Results of evaluations: kept, and shown as tables and a plot."""

import csv
import json

import pytest

from utils import classifier
from utils.errors import InputError
from utils.images import read_png
from utils.results import Results, cell_id


def row(label, **more):
    values = {"fid": 1.25, "kid": 0.002, "kid_std": 0.0005, "precision": 0.75}
    base = {"id": label, "label": label, "reference": "digits:train", "extractor": classifier.NAME, "n": 500,
            "protocol": {"reference_sha256": "a", "extractor_weights_sha256": "b"},
            "seconds_per_image": 0.004, "scores": values,
            "floor": {"fid": 0.5, "kid": 0.001, "precision": 0.9},
            "floor_label": "500 of digits:train against digits:test (180)"}  # fmt: skip
    return base | more


def lines_of(report):
    """The cells of every table line."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_adding_twice_keeps_both_rows(tmp_path):
    out = tmp_path / "deep" / "out"
    Results(out).add(row("ddim, 10 steps"))
    results = Results(out)  # another run of the script
    results.add(row("ddim, 20 steps", scores={"fid": 1.0}))
    again = Results(out)
    assert [found["label"] for found in again.rows] == ["ddim, 10 steps", "ddim, 20 steps"]
    assert again.find("ddim, 10 steps") == row("ddim, 10 steps") and again.find("nope") is None
    assert sorted(path.name for path in out.iterdir()) == ["report.md", "results.csv", "results.json"]


def test_a_sweep_over_steps_is_drawn(tmp_path):
    results = Results(tmp_path)
    for steps in (10, 20):
        kind = {"sampler": "ddim", "skip_type": "uniform", "eta": 0.0, "weights_sha256": "ab"}
        source = kind | {"timesteps": list(range(steps)), "seed": 1}
        assert not (tmp_path / "score_vs_steps.png").exists()
        results.add(row(f"ddim-{steps}", protocol=row("")["protocol"] | {"source": source}))
    assert read_png(tmp_path / "score_vs_steps.png").shape[0] in (3, 4)


def test_the_csv_parses(tmp_path):
    results = Results(tmp_path)
    results.add(row('a "quoted", label'))
    results.add(row("images", floor=None, seconds_per_image=None, n=7))
    with open(tmp_path / "results.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first["label"] == 'a "quoted", label' and first["extractor"] == classifier.NAME and first["n"] == "500"
    assert float(first["fid"]) == 1.25 and float(first["floor_fid"]) == 0.5 and first["recall"] == ""
    assert second["floor_fid"] == "" and second["seconds_per_image"] == "" and float(second["kid"]) == 0.002


def test_the_report_names_extractor_and_count_and_ends_with_the_floor(tmp_path):
    results = Results(tmp_path)
    unmeasured = {"n": 600, "floor": None, "seconds_per_image": None}
    for label, more in (("ddim-10", {}), ("folder", unmeasured), ("ddim-20", {})):
        results.add(row(label, **more))
    report = (tmp_path / "report.md").read_text()
    for metric in ("fid", "kid", "precision"):
        assert f"{metric}[dataset-classifier]@500" in report and f"{metric}[dataset-classifier]@600" in report
    assert "isc[" not in report
    header, _, ten, twenty, floor, header_600, _, folder = lines_of(report)
    assert header == header_600 == ["images", "fid", "kid", "precision", "ms per image"]
    assert ten == ["ddim-10", "1.25", "0.002 ± 0.0005", "0.75", "4.00"] and twenty[0] == "ddim-20"
    assert floor == ["floor: 500 of digits:train against digits:test (180)", "0.5", "0.001", "0.9", ""]
    assert folder == ["folder", "1.25", "0.002 ± 0.0005", "0.75", ""]


def test_the_cost_stands_beside_the_scores(tmp_path):
    results = Results(tmp_path)
    for label, steps, evaluations, seconds in (("ddim", 10, 10, 0.01), ("heun", 10, 19, 0.02), ("full", 100, 100, 0.1)):
        cost = {"evaluations": evaluations, "steps": steps, "total_steps": 100, "seconds_per_image": seconds}
        results.add(row(label, **cost))
    header, _, ddim, heun, full, floor = lines_of((tmp_path / "report.md").read_text())
    assert header[-3:] == ["ms per image", "evaluations", "speed-up"]
    assert [cells[-3:] for cells in (ddim, heun, full)] == [
        ["10.00", "10", "10.0"], ["20.00", "19", "5.0"], ["100.00", "100", "1.0"],
    ]  # fmt: skip
    assert floor[-3:] == ["", "", ""]


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", "null"])
def test_results_that_cannot_be_read_are_not_overwritten(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results\.json"):
        Results(tmp_path)
    assert (tmp_path / "results.json").read_text() == text


def test_the_identity_of_a_score_depends_on_all_of_its_protocol():
    protocol = {"n": 500, "source": {"seed": 1, "eta": 0.0}, "metrics": ["fid"]}
    assert cell_id(protocol) == cell_id(json.loads(json.dumps(dict(reversed(protocol.items())))))
    others = [{**protocol, "n": 501}, {**protocol, "source": {"seed": 2, "eta": 0.0}}, {**protocol, "metrics": ["kid"]}]
    assert len({cell_id(other) for other in [protocol, *others]}) == 4
