"""The page of a run: what stands on it is what the folder holds, it needs nothing else, and no text becomes HTML."""

import base64
import io
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from in_process import KEYS, call, refused
from PIL import Image
from tiny_run import tiny_run

import convert_ddpm
import evaluate_ddpm
import sample_ddpm
import train_ddpm
from utils import checkpoint, config, curves, report
from utils.embedded import LARGE, embed, spread
from utils.images import write_png

HOSTILE = '<script>alert(\'1\')</script>"><img src=x onerror="y">&amp;{{ 7 * 7 }}'
LOG = """2026-01-02 10:00:00 run folder  /x
2026-01-02 10:00:00 machine     1 x cpu with 2 threads, precision no
2026-01-02 10:01:00 saved       /x/ckpt/step000002
2026-01-02 12:00:00 run folder  /x
2026-01-02 12:00:00 machine     2 x cpu with 1 threads, precision no
2026-01-02 12:02:05 saved       /x/ckpt/step000004
not a line of the log
"""


class Page(HTMLParser):
    """Every tag with its attributes, every text by the heading that it stands under, every id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.texts, self.section = [], [], {"": []}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "h2":
            self.section = dict(attrs)["id"]
            self.texts[self.section] = []

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.texts[self.section].append(data.strip())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 2 and 4, two previews, a score while training, captions that want to be HTML."""
    keys = {**KEYS, "model.condition": "text", "model.text_dim": 32, "model.text_length": 128, "model.text_layers": 1}
    keys |= {"data.captions": [HOSTILE + " {}"], "train.n_steps": 8, "train.batch_size": 16, "sample.skip_steps": 2}
    folder = tiny_run(tmp_path / "a run", config.merge(("test", keys | {"model.classes": list("0123456789")})), (2, 4))
    rows = [{"step": s, "loss": 2.0 / s, "lr": 0.01, "images_per_second": 100.0 * s} for s in (1, 2, 3, 4)]
    rows += [{"step": 4, "fid[dataset-classifier]@64": 1.5, HOSTILE: 3.0}, {"step": 4, "loss": float("nan")}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '[1]\n{"step": 5, "lo')
    (folder / "train.log").write_text(LOG)
    (folder / "samples").mkdir()
    for step in (2, 4):
        write_png(folder / "samples" / f"step{step:06d}.png", torch.full((1, 8, 8), step, dtype=torch.uint8))
    return folder


def page_of(folder: Path, *args: object) -> Page:
    call(report.main, folder, *args, cwd=folder.parent)
    return Page((folder / "report.html").read_text())


def test_the_page_tells_what_the_folder_holds(run: Path) -> None:
    (run / "ckpt/step000004/model.safetensors").write_bytes(b"")
    (run / "ckpt/step000001.bad").mkdir()
    checkpoint.mark_best(run, 2)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page = page_of(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {run / "report.html"} and before.items() <= after.items()
    text = {section: " ".join(texts) for section, texts in page.texts.items()}
    assert "a run" in text[""] and "4 of 8" in text[""] and "64" in text[""] and "3 min 5 s" in text[""]
    assert "1 good, 2 not" in text[""] and "best fid[dataset-classifier]@64 1.5 at step 4" in text[""]
    assert "step000002 (best)" in text["checkpoints"] and "set aside" in text["checkpoints"]
    assert "model.safetensors is damaged: its SHA-256 differs" in text["checkpoints"]
    assert "2 x cpu with 1 threads" in text["system"] and "250 images per second" in text["system"]
    assert "2, from 2026-01-02 10:00 to 2026-01-02 12:02" in text["system"]
    assert "step 2" in text["previews"] and "step 4" in text["previews"]
    assert "train.n_steps 8 800000" in text["configuration"] and "n_steps: 8" in text["configuration"]
    assert [tag for tag, _ in page.tags].count("svg") == 3  # loss, learning rate, score


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = page_of(run)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name, "")
            inside = value.startswith("data:image/") or (value[:1] == "#" and value[1:] in ids)
            assert value == "" or inside, (tag, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert len(ids) == len([1 for _, attributes in page.tags if "id" in attributes])  # also those of several SVGs
    text = (run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "default-src 'none'" in text
    assert "url(http" not in text and "@import" not in text and curves.INK not in text


def test_no_text_becomes_html(run: Path) -> None:
    named = run.with_name("<b>&'\"")
    run.rename(named)
    page = page_of(named)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in page.tags)
    assert any(HOSTILE in text for text in page.texts["configuration"])
    assert "<b>&'\"" in page.texts[""]  # as text


def test_the_previews_are_the_files(run: Path) -> None:
    page = page_of(run)
    shown = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    stored = [path.read_bytes() for path in sorted((run / "samples").glob("*.png"))]
    assert [base64.b64decode(src.partition(",")[2]) for src in shown] == stored


def test_a_large_picture_is_reduced_and_a_broken_one_is_named(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (3, 1200, 600), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    write_png(tmp_path / "large.png", noise)
    found = embed(tmp_path / "large.png", "large")
    assert found.pixels == (512, 1024) and "600 x 1200" in found.note and found.uri.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(found.uri.partition(",")[2]))).size == (512, 1024)
    assert (tmp_path / "large.png").stat().st_size > LARGE
    (tmp_path / "broken.png").write_bytes((tmp_path / "large.png").read_bytes()[:500])
    broken = embed(tmp_path / "broken.png", "broken")
    assert not broken.uri and broken.note.startswith("can't be read") and str(tmp_path) not in broken.note


def test_many_previews_are_thinned_with_both_ends() -> None:
    paths = [Path(str(i)) for i in range(100)]
    found = spread(paths, 12)
    assert (
        len(set(found)) == 12 and found[0] == paths[0] and found[-1] == paths[-1] and spread(paths[:3], 12) == paths[:3]
    )


def test_long_curves_are_thinned_to_means() -> None:
    pairs = [(float(i), float(i % 2)) for i in range(6000)]
    found = curves.thinned(pairs)
    assert len(found) == 600 and {value for _, value in found} == {0.5} and found[0][0] == 4.5


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(config.to_yaml(config.merge(("test", KEYS))))
    page = page_of(tmp_path / "run")
    assert page.texts["checkpoints"][1:] == ["None yet."] and "0 of 800,000" in page.texts[""]
    assert "curves" not in page.texts and not any("sample_ddpm" in text for text in page.texts["commands"])


def test_scores_stand_with_whose_they_are(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", config.merge(("test", {**KEYS, "sample.skip_steps": 2})), (2, 4))
    call(sample_ddpm.main, "--weights", run, "--n_samples", 4, "--save_dir", run / "images/own", cwd=run.parent)
    score = ["--reference", "digits:test", "--metrics", "bpd", "--n_samples", 4, "--data.valid_fraction", 0.1]
    call(evaluate_ddpm.main, "--weights", run, *score, cwd=run.parent)
    page = page_of(run)
    [row] = json.loads((run / "scores/step000004/results.json").read_text())["rows"]
    assert f"{row['scores']['bpd']:.4g}" in " ".join(page.texts["scores"]) and row["label"] in page.texts["scores"]
    assert "step000004: bpd@4 against digits:test" in page.texts["scores"]
    assert "own: ddim, 2 trailing steps, seed 2022" in page.texts["previews"]
    row["protocol"]["source"]["weights_sha256"] = "0" * 64
    (run / "scores/step000004/results.json").write_text(json.dumps({"rows": [row]}))
    assert any("of other weights than this checkpoint" in text for text in page_of(run).texts["scores"])
    (run / "scores/step000004/results.json").write_text('{"rows": [{"protocol": {}}]}')
    assert "scores/step000004/results.json can't be read" in page_of(run).texts["scores"]


def test_the_commands_on_the_page_are_understood(run: Path) -> None:
    told = page_of(run).texts["commands"]
    assert any("--labels all" in line for line in told)
    commands = [line for line in told if line.startswith(("accelerate", "python"))]
    scripts = {
        f"{module.__name__}.py": module.main for module in (train_ddpm, sample_ddpm, evaluate_ddpm, convert_ddpm)
    }
    assert len(commands) == 6
    for line in commands:
        words = shlex.split(line)
        script = next((word for word in words if word in scripts), None)
        if script:
            call(scripts[script], *words[words.index(script) + 1 :], "--print_config", cwd=run.parent)
    assert [shlex.split(line)[1:] for line in commands[4:]] == [
        ["-m", "utils.checkpoint", "verify", str(run)],
        ["-m", "utils.report", str(run)],
    ]


def test_out_puts_the_page_elsewhere_and_replaces_it(run: Path) -> None:
    done = call(report.main, run, "--out", "page.html", cwd=run.parent)
    first = (run.parent / "page.html").read_text()
    assert not (run / "report.html").exists() and str(run.parent / "page.html") in done.stdout
    (run / "metrics.jsonl").unlink()
    call(report.main, run, "--out", "page.html", cwd=run.parent)
    assert "svg" in first and "<svg" not in (run.parent / "page.html").read_text()
    assert not list(run.parent.glob(".*.tmp"))


def test_wrong_folders_are_refused(run: Path) -> None:
    place = run.parent
    (place / "empty").mkdir()
    (place / "file").write_text("")
    for args, says in [
        (["missing"], ["missing: no such run folder"]),
        (["file"], ["file: a file, not a run folder"]),
        (["empty"], ["empty is not a run folder: it holds no config.yaml"]),
        ([run / "ckpt/step000002"], ["is a checkpoint: give its run folder"]),
        ([run, "--out", "empty"], ["--out empty is a folder"]),
        ([run, "--out", "nowhere/page.html"], ["there is no folder nowhere"]),
        ([], ["RUN", "usage"]),
        ([run, "--outt", "x"], ["--outt"]),
    ]:
        refused(report.main, *args, cwd=place, says=says)
    (run / "config.yaml").write_text("model: {dim: wide}")
    refused(report.main, run, cwd=place, says=["model.dim"])
