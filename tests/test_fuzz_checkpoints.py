"""Seeded noise in checkpoints: told before anything is loaded; with forged sums, a result or one clear line."""

import hashlib
import json
import random
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from in_process import call
from safetensors.torch import load_file, save_file
from test_fuzz_lines import laughs

import sample_ddpm
import train_ddpm
from utils import checkpoint

FILES = ("config.yaml", "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json")
SMALL = [*TINY, "--model.num_res_blocks", "1", "--model.attn_resolutions", "[4]", "--diffusion.total_steps", "20",
         "--train.log_with", "none", "--train.mixed_precision", "no", "--train.n_steps", "2", "--train.save_every", "1",
]  # fmt: skip
DAMAGE = ("flipped", "truncated", "extended", "removed", "exchanged", "older", "emptied", "folder")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("done")
    call(train_ddpm.main, "-e", folder / "run", *SMALL, cwd=folder)
    (folder / "run" / ".lock").unlink()
    return folder / "run"


@pytest.fixture
def run(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "run")


def damage(rng, path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "flipped":
        i = rng.randrange(len(raw) if rng.random() < 0.5 else min(len(raw), 3000))
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :])
    elif how == "truncated":
        path.write_bytes(raw[: rng.randrange(len(raw))])
    elif how == "extended":
        path.write_bytes(raw + rng.randbytes(rng.randint(1, 99)))
    elif how == "exchanged":
        other = path.with_name(rng.choice([name for name in FILES if name != path.name]))
        path.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    elif how == "older":
        path.write_bytes((path.parent.parent / "step000001" / path.name).read_bytes())
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()


def forge(folder: Path) -> None:
    """A manifest that vouches for the files as they are."""
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    (folder / "manifest.json").write_text(json.dumps({"step": int(folder.name[4:]), "sha256": sums}))


def parsed(path: Path):
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError):
        return None


def test_damage_is_told_before_anything_is_loaded_and_the_checkpoint_before_is_used(done, tmp_path, monkeypatch):
    for reader in ("torch.load", "utils.checkpoint.load_file"):
        monkeypatch.setattr(reader, lambda *_, **__: pytest.fail("was loaded"))
    rng, good, harmless = random.Random(1), parsed(done / "ckpt/step000002/manifest.json"), 0
    cases = [(how, name) for how in DAMAGE for name in (*FILES, "manifest.json")] * 3
    for i, (how, name) in enumerate(cases):
        run = shutil.copytree(done, tmp_path / str(i))
        older, newer = checkpoint.published(run)
        same = (older / name).read_bytes() == (newer / name).read_bytes()
        damage(rng, newer / name, how)
        if (same and how == "older") or (name == "manifest.json" and parsed(newer / name) == good):
            harmless += 1  # the same configuration, or other white space
            continue
        why, said = checkpoint.problem(newer), []
        assert why and (name in why or name == "manifest.json" or how == "exchanged"), (how, name, why)
        assert checkpoint.newest(run, said.append) == (older, [newer]), (how, name)
        assert said == [f"skipping checkpoint step000002: {why}"]
        shutil.rmtree(run)
    assert len(cases) - harmless > 120


@pytest.mark.parametrize("text", [
    b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b'{"sha256": {"a\\u0000b": 1}, "step": 2}', b"NaN", b'"\\ud800"',
    b'{"step": 2, "sha256": [[1]]}', b'{"step": 2, "sha256": {"config.yaml": null}}', b'{"step": 2, "sha256": "abc"}',
], ids=lambda text: text[:24].decode())  # fmt: skip
def test_a_hostile_manifest_is_a_problem(run, text):
    (run / "ckpt/step000002/manifest.json").write_bytes(text)
    assert "manifest.json" in checkpoint.problem(run / "ckpt/step000002")


def refusal(main, *args: object, cwd: Path) -> str:
    """Nothing where the script did what was asked, else the line with which it refused; a traceback is neither."""
    try:
        call(main, *args, cwd=cwd)
    except AssertionError as error:
        status, *_, line, end = str(error).split("\n")
        if status != "status 2" or end or not line.startswith(f"{main.__module__}.py: error: "):
            raise
        return line
    return ""


def resume(run: Path, n_steps: int = 2) -> str:
    return refusal(train_ddpm.main, "-e", run, "-r", "auto", "--train.n_steps", n_steps, cwd=run.parent)


def sample(run: Path, load_ema: bool = True) -> str:
    out = run.parent / f"out-{time.monotonic_ns()}"
    args = ("--weights", run, "--n_samples", 1, "--skip_steps", 1, "--save_dir", out, "--load_ema", load_ema)
    return refusal(sample_ddpm.main, *args, cwd=run.parent)


def test_forged_damage_is_a_result_or_one_line(done, tmp_path):
    rng, tracebacks, endings = random.Random(2), [], []
    kinds = ["flipped", "flipped", "flipped", "truncated", "extended", "exchanged", "emptied"]
    cases = [(how, name) for how in kinds for name in FILES] * 2
    for i, (how, name) in enumerate(cases):
        run = shutil.copytree(done, tmp_path / str(i) / "run")
        folder = run / "ckpt" / "step000002"
        damage(rng, folder / name, how)
        forge(folder)
        assert checkpoint.problem(folder) is None
        actions = [resume] if name in ("optimizer.pt", "state.json") else [sample] if i % 2 else [sample, resume]
        for act in actions:
            try:
                endings.append(act(run))
            except Exception as error:
                tracebacks.append(f"{act.__name__} {name} {how} ({i}): {type(error).__name__}: {str(error)[:200]}")
        shutil.rmtree(run.parent)
    assert not tracebacks, f"{len(tracebacks)} of {len(cases)}\n" + "\n".join(tracebacks)
    assert len(cases) >= 70 and sum(map(bool, endings)) > 20 and endings.count("") > 10


def forged(path: Path, content) -> None:
    """Text, bytes, or what torch.save or save_file writes, in a checkpoint whose manifest agrees."""
    if isinstance(content, (str, bytes)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))
    forge(path.parent)


NO = object()  # the entry is left out
HUGE = 2**40
STATES = [
    *(("step", value) for value in (NO, None, "2", -1, 2.5, [2], {}, 7, 10**30, float("nan"))),
    *(("ema", value) for value in (NO, None, [], "x", {}, {"step": 1}, {"step": "x", "initted": True})),
    *(("ema", {"step": step, "initted": True}) for step in (None, -5, 10**30, [1])),
    *(("meter", value) for value in ([1], "x", {"loss": 1.0}, 5)),
    *(("resolved", value) for value in ([1], "x", {"compile": False}, 5)),
    *(("resolved", {"mixed_precision": p, "compile": False, "deterministic": True}) for p in ("fp64", None, [])),
]
TEXTS = {
    "state.json": ["", "null", "[]", "2", '"x"', "{", "[" * 100_000, b"\xff", '{"step": ' + "9" * 5000],
    "config.yaml": ["- a", "{", "seed: x", b"\xff", "[" * 3000, "a: [" + "[" * 3000 + "]" * 3001, "seed: 1" + "0" * 400,
                    "model: {dim: 6}", "model: {dim_mults: []}", f"model: {{dim: {HUGE}, norm_groups: 1}}",
                    f"diffusion: {{total_steps: {HUGE}}}", laughs(9)],
}  # fmt: skip


@pytest.mark.parametrize("name, value", STATES, ids=lambda v: "none" if v is NO else str(v)[:40])
def test_a_confused_state_is_refused_by_name(run, name, value):
    path = run / "ckpt/step000002/state.json"
    state = json.loads(path.read_text()) | {name: value}
    forged(path, {key: v for key, v in state.items() if v is not NO})
    assert "state.json" in resume(run)


FORGED = [(name, text) for name, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize("name, text", FORGED, ids=lambda v: str(v)[:24])
def test_a_forged_text_is_refused(run, name, text):
    forged(run / "ckpt/step000002" / name, text)
    line = resume(run)
    assert line and (name in line or name == "config.yaml")
    assert name == "state.json" or sample(run)


DTYPES = [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
WEIGHTS = {
    "another name": lambda w: {**w, "x": torch.zeros(1)}, "missing": lambda w: dict(list(w.items())[1:]),
    "none": lambda w: {}, "shape": lambda w: {n: v[None] for n, v in w.items()},
    "flat": lambda w: {n: v.flatten() for n, v in w.items()}, "empty": lambda w: {n: v[:0] for n, v in w.items()},
} | {str(dtype): lambda w, dtype=dtype: {n: v.to(dtype) for n, v in w.items()} for dtype in DTYPES}  # fmt: skip
HEADERS = [
    *(b"{}", b"[]", b"null", b'{"a": 1}', b"[" * 100_000),
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [18446744073709551615, 4], "data_offsets": [0, 4]}}',
]


@pytest.mark.parametrize("how", [*WEIGHTS, *range(len(HEADERS)), "long header"])
@pytest.mark.parametrize("name", ["ema.safetensors", "model.safetensors"])
def test_odd_weights_are_named_or_used(run, name, how):
    path = run / "ckpt/step000002" / name
    if how in WEIGHTS:
        save_file(WEIGHTS[how](load_file(path)), path)
    else:
        header = b"{}" if how == "long header" else HEADERS[how]
        path.write_bytes(struct.pack("<Q", 2**62 if how == "long header" else len(header)) + header + bytes(4))
    forge(path.parent)
    for line in (sample(run, name.startswith("ema")), resume(run)):
        assert name in line or (line == "" and "torch" in str(how))


def entries(change):
    """A change of every value in the optimizer's state."""
    return lambda o: {**o, "state": {i: {n: change(n, v) for n, v in held.items()} for i, held in o["state"].items()}}


def group(**changes):
    return lambda o: {**o, "param_groups": [{**o["param_groups"][0], **changes}]}


REFUSED = {
    "none": lambda o: None, "list": lambda o: [o], "tensor": lambda o: torch.zeros(3), "empty": lambda o: {},
    "no group": lambda o: {**o, "param_groups": []}, "groups": group(params=["a"]), "beta": group(betas=(0.9,)),
    "group": lambda o: {**o, "param_groups": {}}, "state list": lambda o: {**o, "state": []}, "eps": group(eps=None),
    "entry": lambda o: {**o, "state": {0: 5}}, "text": entries(lambda n, v: "x"), "betas": group(betas="ab"),
    "null": entries(lambda n, v: None), "decay": group(weight_decay="x"),
    "short": entries(lambda n, v: v.flatten()[:1]),  # a fused update goes on behind its end
    "nothing held": entries(lambda n, v: v if n == "step" else v[:0]),
    "long": entries(lambda n, v: v if n == "step" else torch.cat([v, v])),
    "int": entries(lambda n, v: v.long()), "bool step": entries(lambda n, v: True if n == "step" else v),
    "fused": group(fused="x", foreach=True), "capturable": group(capturable=True), "amsgrad": group(amsgrad=True),
    "no state": lambda o: {**o, "state": {}}, "one lost": lambda o: {**o, "state": dict(list(o["state"].items())[1:])},
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_an_odd_optimizer_is_named(run, how):
    path = run / "ckpt/step000002/optimizer.pt"
    forged(path, REFUSED[how](torch.load(path, weights_only=True)))
    assert "optimizer.pt can't be loaded" in resume(run, n_steps=3)
