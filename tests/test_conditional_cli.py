"""Conditional networks through the command lines: trained, resumed, on two processes, sampled in every mode, scored."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run
from in_process import call, forked, on_two_processes, random_weights, refused
from PIL import Image
from safetensors.torch import load_file

import evaluate_ddpm
import sample_ddpm
import train_ddpm

CLASSIFIER = ["--feature_extractor", "dataset-classifier"]
EXACT = ["--sample.mixed_precision", "no"]
CLASSES = [str(digit) for digit in range(10)]
CLASS = ["--model.condition", "class", "--train.condition_dropout", "0.2"]
TEXT = [
    *("--model.condition", "text", "--train.condition_dropout", "0.2", "--model.cross_attn_resolutions", "[4]"),
    *("--model.text_dim", "32", "--model.text_length", "16", "--data.captions", "[{}, the digit {}]"),
]
KINDS = {"class": CLASS, "text": TEXT}
TWELVE = [*TINY, "--train.n_steps", 12, "--train.save_every", 6, "--train.micro_batch", 5, "--model.dropout", 0.1]


def weights_of(run_folder: Path) -> dict[str, torch.Tensor]:
    folder, names = run_folder / "ckpt" / "step000012", ("model.safetensors", "ema.safetensors")
    return {f"{name} {key}": value for name in names for key, value in load_file(folder / name).items()}


@pytest.fixture(scope="module", params=KINDS)
def conditional(request, tmp_path_factory) -> tuple[str, Path]:
    """(kind, a run of 12 steps, made in one go)."""
    folder = tmp_path_factory.mktemp(request.param)
    run("train_ddpm.py", "-e", "run", *TWELVE, *KINDS[request.param], cwd=folder)
    return request.param, folder / "run"


def test_a_stopped_run_goes_on_to_the_same_bits(conditional, tmp_path) -> None:
    _, whole = conditional
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt/step000012")  # as if killed before
    forked(train_ddpm.main, "-e", "run", "-r", "auto", cwd=tmp_path)
    found, wanted = weights_of(tmp_path / "run"), weights_of(whole)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_two_processes_train_the_same_and_draw_the_same(conditional, tmp_path) -> None:
    kind, _ = conditional
    keys = [*TINY, *KINDS[kind], "--train.n_steps", 12, "--train.mixed_precision", "no"]
    forked(train_ddpm.main, "-e", "one", *keys, cwd=tmp_path)
    draw = ["--weights", "one", "--n_samples", 6, "--labels", "7", "3", "9", *EXACT]
    call(sample_ddpm.main, *draw, "--guidance_scale", 2, "--save_dir", "alone", cwd=tmp_path)
    on_two_processes(
        tmp_path,
        ["train_ddpm.py", "-e", "two", *keys],
        ["sample_ddpm.py", *draw, "--guidance_scale", 2, "--save_dir", "together"],
        ["train_ddpm.py", "-e", "divided", *keys, "--train.shard", "true"],
    )
    for other in ("two", "divided"):
        lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", other)]
        losses = [[json.loads(line)["loss"] for line in part if '"loss"' in line] for part in lines]
        assert len(losses[0]) == 12 and np.allclose(*losses, atol=1e-5)
    for i in range(6):
        pixels = [
            np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")).astype(int) for name in ("alone", "together")
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_the_run_says_what_the_condition_is(conditional) -> None:
    kind, folder = conditional
    log = (folder / "train.log").read_text()
    assert "condition   " + ("10 classes" if kind == "class" else "texts of 10 classes, 40 captions") in log
    assert "20% dropped" in log


MODES = {
    "sample": [],
    "denoise": ["--n_denoise", 2],
    "progressive": ["--n_progressive", 2],
    "interpolate": ["--n_interpolate", 3],
    "reconstruct": ["--source", "digits"],
    "inpaint": ["--source", "digits", "--mask", "left", "--n_resample", 2],
    "consistency": ["--skip_steps", 1, 2],
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> dict[str, Path]:
    """Random weights of both kinds, on which conditions act."""
    folder, crossed = tmp_path_factory.mktemp("untrained"), {"model.cross_attn_resolutions": [8, 4]}
    text = {"model.text_dim": 32, "model.text_length": 16, "data.captions": ["{}", "the digit {}"], **crossed}
    both = {"model.classes": CLASSES, "train.condition_dropout": 0.1, "sample.skip_steps": 3}
    return {
        "class": random_weights(folder / "class", **both, **{"model.condition": "class"}),
        "text": random_weights(folder / "text", **both, **text, **{"model.condition": "text"}),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_conditions(kind: str, mode: str, untrained, tmp_path) -> None:
    words = ["--labels", "7", "3"] if kind == "class" else ["--prompts", "seven", "the digit 3"]
    for name, more in (("a", words), ("b", [words[0], *reversed(words[1:])])):
        call(sample_ddpm.main, "--weights", untrained[kind], "--n_samples", 4, "--save_dir", name, "--mode", mode,
             *more, "--guidance_scale", 3, *MODES[mode], cwd=tmp_path)  # fmt: skip
    files = [sorted((tmp_path / name).glob("*.png")) for name in ("a", "b")]
    assert len(files[0]) == (2 if mode == "interpolate" else 4)
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*files))  # the condition acts
    assert Image.open(tmp_path / "a-grid.png").size[0] > 64


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_entry_i_belongs_to_sample_i_and_lists_cycle(untrained, tmp_path) -> None:
    for name, more in {
        "cycled": ["--labels", "7", "3"],
        "whole": ["--labels", "7", "3", "7", "3", "7"],
        "alone": ["--labels", "3"],
        "none": [],
    }.items():
        call(sample_ddpm.main, "--weights", untrained["class"], "--n_samples", 5, "--save_dir", name, *more,
             "--micro_batch", 5, cwd=tmp_path)  # fmt: skip
    images = {
        name: [picture(tmp_path / name / f"{i:06d}.png") for i in range(5)]
        for name in ("cycled", "whole", "alone", "none")
    }
    for i in range(5):
        assert (images["cycled"][i] == images["whole"][i]).all()
        assert (images["cycled"][i] == images["alone"][i]).all() == (i % 2 == 1)
        assert (images["none"][i] != images["cycled"][i]).any()
    stored = json.loads((tmp_path / "cycled/protocol.json").read_text())["identity"]
    assert stored["conditions"] == [7, 3] and stored["guidance_rescale"] == 0
    assert "conditions" not in json.loads((tmp_path / "none/protocol.json").read_text())["identity"]


def test_several_scales_are_rows(untrained, tmp_path) -> None:
    base = ["--weights", untrained["text"], "--n_samples", 3, "--prompts", "7", *EXACT]
    call(sample_ddpm.main, *base, "--guidance_scale", 0, 1, 3, "--save_dir", "rows", cwd=tmp_path)
    for scale in (0, 1, 3):
        call(sample_ddpm.main, *base, "--guidance_scale", scale, "--save_dir", f"s{scale}", cwd=tmp_path)
    call(sample_ddpm.main, *base[:4], *base[6:], "--save_dir", "none", cwd=tmp_path)
    for i in range(3):
        found = picture(tmp_path / "rows" / f"{i:06d}.png")
        assert found.shape == (24, 8)
        for row, scale in enumerate((0, 1, 3)):
            assert (found[8 * row : 8 * row + 8] == picture(tmp_path / f"s{scale}" / f"{i:06d}.png")).all()
        assert (found[:8] == picture(tmp_path / "none" / f"{i:06d}.png")).all()  # scale 0 is no condition


def test_interpolated_ends_are_the_samples_themselves(untrained, tmp_path) -> None:
    base = ["--weights", untrained["text"], "--prompts", "7", "the digit three", *EXACT]
    call(sample_ddpm.main, *base, "--n_samples", 4, "--save_dir", "plain", cwd=tmp_path)
    call(sample_ddpm.main, *base, "--n_samples", 4, "--save_dir", "rows", "--mode", "interpolate", "--n_interpolate", 4,
         cwd=tmp_path)  # fmt: skip
    for row in range(2):
        found = picture(tmp_path / "rows" / f"{row:06d}.png")
        for end, pixels in ((0, found[:, :8]), (1, found[:, -8:])):
            assert np.abs(pixels - picture(tmp_path / "plain" / f"{2 * row + end:06d}.png")).max() <= 1
    call(sample_ddpm.main, *base, "--n_samples", 4, "--save_dir", "real", "--mode", "interpolate", "--source", "digits",
         "--n_interpolate", 3, cwd=tmp_path)  # fmt: skip


@pytest.mark.parametrize("given, says", [
    (["--labels", "eleven"], ["--labels 'eleven': no such class", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]),
    (["--prompts", "seven"], ["reads classes, not text"]),
    (["--guidance_scale", "2"], ["--guidance_scale", "--labels"]),
    (["--labels", "1", "--guidance_scale", "-1"], ["sample.guidance_scale = '-1'", ">= 0"]),
    (["--labels", "1", "--guidance_scale", "1", "x"], ["--guidance_scale x"]),
    (["--labels", "1", "--mode", "denoise", "--guidance_scale", "1", "2"], ["several scales belong to --mode sample"]),
])  # fmt: skip
def test_wrong_conditions_are_one_line(given: list[str], says: list[str], untrained, tmp_path) -> None:
    base = ["--weights", untrained["class"], "--n_samples", 2, "--save_dir", "out"]
    refused(sample_ddpm.main, *base, *given, cwd=tmp_path, says=says)


def test_an_unconditional_network_has_no_use_for_labels(tmp_path) -> None:
    net = random_weights(tmp_path / "net")
    base = ["--weights", net, "--n_samples", 2, "--save_dir", "out"]
    refused(sample_ddpm.main, *base, "--labels", "1", cwd=tmp_path, says=["--labels needs a conditional network"])
    says = ["guidance needs a conditional network"]
    refused(sample_ddpm.main, *base, "--guidance_scale", "1", "2", cwd=tmp_path, says=says)
    refused(evaluate_ddpm.main, "--weights", net, "--reference", "digits", *CLASSIFIER,
            "--metrics", "condition_accuracy", "--n_samples", 100, cwd=tmp_path,
            says=["condition_accuracy needs --weights"],
            )  # fmt: skip


def test_a_network_that_was_never_left_without_a_condition_needs_one(tmp_path) -> None:
    net = random_weights(tmp_path / "net", **{"model.condition": "class", "model.classes": CLASSES})
    base = ["--weights", net, "--n_samples", 2, "--save_dir", "out"]
    refused(sample_ddpm.main, *base, cwd=tmp_path, says=["train.condition_dropout", "--labels all"])
    says = ["train.condition_dropout above 0"]
    refused(sample_ddpm.main, *base, "--labels", "all", "--guidance_scale", 2, cwd=tmp_path, says=says)


def test_a_caption_of_a_label_may_be_too_long(untrained, tmp_path) -> None:
    base = ["--weights", untrained["text"], "--n_samples", 1, "--save_dir", "out", "--labels", "3"]
    says = ["'the very long digit 3'", "has 21 bytes", "at most 15"]
    refused(sample_ddpm.main, *base, "--data.captions", "[the very long digit {}]", cwd=tmp_path, says=says)


def test_scores_over_guidance_scales(untrained, tmp_path) -> None:
    """Rows differ by scale, classes have a table, nothing is computed twice, and what is stored can be verified."""
    scored = ["--weights", untrained["text"], "--reference", "digits", *CLASSIFIER,
              "--metrics", "fid", "condition_accuracy", "--n_samples", 200, "--out", "out",
              "--data.valid_fraction", 0.1,
              "--guidance_scales", 0, 1, 4, "--per_class", "--force"]  # fmt: skip
    call(evaluate_ddpm.main, *scored, cwd=tmp_path)
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["protocol"]["source"]["guidance_scale"] for row in rows] == [0, 1, 4]
    assert [row["evaluations"] for row in rows] == [3, 3, 6]
    for row in rows:
        assert 0 <= row["scores"]["condition_accuracy"] <= 1
        assert list(row["per_class"]) == CLASSES
        assert all(values.keys() == {"fid", "condition_accuracy"} for values in row["per_class"].values())
    assert len({row["scores"]["fid"] for row in rows}) == 3
    report = (tmp_path / "out/report.md").read_text()
    assert "guidance 4" in report and "mean over classes" in report and (tmp_path / "out/accuracy_vs_fid.png").exists()
    again = call(evaluate_ddpm.main, *scored, cwd=tmp_path)
    assert again.stderr.count("already in") == 3
    verified = call(evaluate_ddpm.main, "--verify", "out/results.json", cwd=tmp_path)
    assert "DIFFERS" not in verified.stdout
    del scored[scored.index("--force")]
    few = call(evaluate_ddpm.main, *scored, "--seed", 5, cwd=tmp_path, status=2).stderr.splitlines()[-1]
    assert "--per_class: the class 8 has 15 images, fewer than the 64 dimensions" in few and "--force" in few
    fewer = call(evaluate_ddpm.main, *scored, "--n_samples", 30, "--force", cwd=tmp_path, status=2).stderr.splitlines()
    assert "--per_class: the class" in fewer[-1] and "wanted at least 4" in fewer[-1]


def test_real_images_in_place_of_generated_ones_are_what_was_asked(untrained, tmp_path, monkeypatch) -> None:
    """An oracle that answers each request with a real image of that class gets the classifier's own accuracy."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    by_class = [
        torch.from_numpy((bunch.images[bunch.target == c] * 255 / 16).round()).byte()[:, None] for c in range(10)
    ]

    def generate(net, process, options, indices, seed, micro_batch, cond, dtype, fill):
        from diffusions import Batch

        labels = cond(torch.tensor(indices))["label"].tolist()
        images = torch.stack([by_class[label][i % 100] for label, i in zip(labels, indices)])
        yield Batch(torch.tensor(indices), images)

    monkeypatch.setattr("utils.scoring.generate_fitting", generate)
    call(evaluate_ddpm.main, "--weights", untrained["class"], "--reference", "digits", *CLASSIFIER,
         "--metrics", "condition_accuracy", "fid", "--n_samples", 300, "--data.valid_fraction", 0.1,
         "--out", "out", cwd=tmp_path)  # fmt: skip
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert row["scores"]["condition_accuracy"] > 0.97


def test_a_folder_of_pictures_with_texts_trains(tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"gray number {i}"}) for i in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    keys = [*TINY, *TEXT[:-2], "--data.name", "image_folder", "--data.root", folder, "--data.valid_fraction", 0.2]
    keys[keys.index("--model.text_length") + 1] = 24
    forked(train_ddpm.main, "-e", "run", *keys, "--train.n_steps", 2, "--train.evaluate_every", "null", cwd=tmp_path)
    config = (tmp_path / "run/config.yaml").read_text()
    assert "classes: []" in config
    call(sample_ddpm.main, "--weights", "run", "--n_samples", 2, "--save_dir", "out", "--prompts", "any text at all",
         cwd=tmp_path)  # fmt: skip
    says = ["--labels: this network was trained on texts of its own"]
    refused(
        sample_ddpm.main,
        "--weights",
        "run",
        "--n_samples",
        2,
        "--save_dir",
        "o",
        "--labels",
        "1",
        cwd=tmp_path,
        says=says,
    )


def test_training_scores_conditional_images(tmp_path) -> None:
    forked(train_ddpm.main, "-e", "run", *TINY, *CLASS, "--train.n_steps", 4, "--train.evaluate_every", 2,
         "--train.n_evaluate", 100, cwd=tmp_path)  # fmt: skip
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert lines.count("fid[dataset-classifier]@100") == 2 and (tmp_path / "run/ckpt/best").exists()
    assert any("condition" in name for name in load_file(tmp_path / "run/ckpt/best/ema.safetensors"))
