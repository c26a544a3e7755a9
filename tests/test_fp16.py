"""fp16 and its loss scaler through train_ddpm.py, on the CPU, where it is otherwise refused: no GPU is needed."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY
from in_process import call
from safetensors.torch import load_file

import train_ddpm
from utils import checkpoint, distributed, precision
from utils.state import read_state

ARGS = [*TINY, "--train.mixed_precision", "fp16", "--train.micro_batch", "8", "--train.save_every", "4"]
ARGS += ["--train.warmup_steps", "0", "--model.num_res_blocks", "1", "--train.log_with", "none"]


@pytest.fixture
def fp16(monkeypatch):
    """Half precision with a scaler that starts where every gradient overflows."""
    start = distributed.start

    def started(mixed_precision, **kwargs):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = start("no", **kwargs)
        if mixed_precision == "fp16":
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return accelerator

    monkeypatch.setattr(distributed, "start", started)
    monkeypatch.setattr(precision, "on_gpu", lambda: True)
    monkeypatch.setattr(precision, "wants_compile", lambda asked, flops: False)
    monkeypatch.setattr(precision, "wants_determinism", lambda asked: True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(cwd: Path, *args: object, status: int = 0):
    done = call(train_ddpm.main, "-e", "run", *ARGS, *args, cwd=cwd, status=status)
    (cwd / "run/.lock").unlink()  # held until the process ends
    rows = [json.loads(line) for line in (cwd / "run/metrics.jsonl").read_text().splitlines()]
    return done, [row for row in rows if "bad_steps" in row]


def test_overflows_are_skipped_and_counted_until_the_scale_fits(tmp_path, fp16):
    _, rows = train(tmp_path, "--train.n_steps", 48, "--train.keep_last", "null", "--train.max_bad_steps", 40)
    n_bad = sum(row["bad_steps"] for row in rows)
    first = [row["bad_steps"] for row in rows].index(0)
    assert first > 10 and n_bad >= first and rows[first - 1]["bad_in_row"] == first and rows[-1]["bad_in_row"] == 0
    states = {checkpoint.step_of(path): read_state(path) for path in checkpoint.published(tmp_path / "run")}
    assert states[4]["scaler"]["scale"] == 2.0**36 and states[48]["scaler"]["scale"] == 2.0 ** (40 - n_bad)
    weights = {step: load_file(tmp_path / f"run/ckpt/step{step:06d}/model.safetensors") for step in (4, 8, 48)}
    assert all(torch.equal(weights[4][name], weights[8][name]) for name in weights[4])  # skipped: nothing has moved
    assert any(not torch.equal(weights[4][name], weights[48][name]) for name in weights[4])


def test_the_scale_is_part_of_a_resumed_run(tmp_path, fp16):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", "--train.n_steps", 40, "--train.max_bad_steps", 40)
    train(tmp_path / "parts", "--train.n_steps", 20, "--train.max_bad_steps", 40)
    train(tmp_path / "parts", "--train.n_steps", 40, "--train.max_bad_steps", 40, "-r", "auto")
    ends = [tmp_path / name / "run/ckpt/step000040" for name in ("whole", "parts")]
    a, b = (load_file(end / "model.safetensors") for end in ends)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_state(ends[0]) == read_state(ends[1])


def test_a_network_beyond_fp16_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, fp16):
    train(tmp_path, "--train.n_steps", 40, "--train.max_bad_steps", 40)
    good = checkpoint.published(tmp_path / "run")[-1]
    weights = load_file(good / "model.safetensors")
    before = {name: (good / name).read_bytes() for name in ("model.safetensors", "manifest.json")}
    blown = {**weights, "conv_in.weight": weights["conv_in.weight"] * 1e6}  # activations above 65,504
    assert torch.isfinite(blown["conv_in.weight"]).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_weights", lambda path: blown)
        done, rows = train(
            tmp_path, "-r", "auto", "--train.n_steps", 90, "--train.keep_last", 1, "--train.save_every", 100, status=1
        )
    assert "40 updates in a row had a non-finite gradient" in done.stderr and "Traceback" not in done.stderr
    assert rows[-1]["step"] == 80 and rows[-1]["bad_in_row"] == 40
    assert checkpoint.newest(tmp_path / "run", pytest.fail) == (good, [])
    assert before == {name: (good / name).read_bytes() for name in before}
