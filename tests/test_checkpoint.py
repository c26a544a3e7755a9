"""Checkpoints are whole or not there: every kind of damage is noticed and named, and nothing good is lost."""

import errno
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from utils import checkpoint, config, logging, training_state
from utils.checkpoint import load_weights, newest, problem, prune, publish, published, read_optimizer, read_weights
from utils.errors import InputError, SaveFailed, TrainingDiverged
from utils.optimizer import build_ema
from utils.state import read_state

PARTS = ("config.yaml", "ema.safetensors", "model.safetensors", "optimizer.pt", "state.json")


def network(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def save(run, step, value=1.0):
    """Publish a checkpoint whose weights are all `value`."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = {name: torch.full_like(tensor, value) for name, tensor in net.state_dict().items()}
    state = {"step": step, "ema": {"step": 2, "initted": True}, "scaler": None}
    return publish(run / "ckpt", step, "seed: 0\n", weights, weights, optimizer.state_dict(), state)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# Publishing


def test_a_published_checkpoint_is_whole(tmp_path):
    folder = save(tmp_path, 500)
    assert folder == tmp_path / "ckpt" / "step000500" and problem(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == sorted([*PARTS, "manifest.json"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 500
    assert manifest["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in PARTS}
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step000500"]  # no staging folder is left
    assert read_state(folder)["step"] == 500
    assert read_optimizer(folder)["param_groups"][0]["lr"] == 1e-3


def test_weights_are_stored_as_plain_contiguous_fp32(tmp_path):
    weights = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([0.5, 2]).bfloat16()}
    stored = read_weights(publish(tmp_path / "ckpt", 1, "", weights, weights, {}, {}) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32} and stored["a"].is_contiguous()
    assert torch.equal(stored["a"], weights["a"]) and stored["b"].tolist() == [0.5, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["model", "EMA"])
def test_weights_that_are_not_finite_are_never_published(tmp_path, kind, value):
    good = save(tmp_path, 1)
    fine, broken = {"w": torch.zeros(3)}, {"v": torch.zeros(2), "w": torch.tensor([0, value, 0])}
    pair = (broken, fine) if kind == "model" else (fine, broken)
    with pytest.raises(TrainingDiverged, match=rf"{kind} weights of step 2 .*\(w\)"):
        publish(tmp_path / "ckpt", 2, "", *pair, {}, {})
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step000001"] and problem(good) is None


def test_publishing_again_keeps_a_good_folder(tmp_path):
    folder = save(tmp_path, 5, 1.0)
    before = (folder / "manifest.json").read_bytes()
    assert save(tmp_path, 5, 2.0) == folder and (folder / "manifest.json").read_bytes() == before
    assert len(list((tmp_path / "ckpt").iterdir())) == 1


def test_publishing_again_sets_a_damaged_folder_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        folder = save(tmp_path, 5, value)
        assert problem(folder) is None and bool((read_weights(folder / "model.safetensors")["0.bias"] == value).all())
        damage(folder / "optimizer.pt", "flipped")
    save(tmp_path, 5, 4.0)
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == ["step000005", "step000005.bad", "step000005.bad2", "step000005.bad3"]
    aside = [read_weights(tmp_path / "ckpt" / name / "model.safetensors")["0.bias"][0].item() for name in names[1:]]
    assert aside == [1.0, 2.0, 3.0]
    assert [path.name for path in published(tmp_path)] == ["step000005"]


def test_a_damaged_folder_that_can_not_be_set_aside_is_a_failed_save(tmp_path, monkeypatch):
    damage(save(tmp_path, 5) / "model.safetensors", "truncated")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "quarantine", refuse)
    with pytest.raises(SaveFailed, match="step 5 could not be written: Permission denied"):
        save(tmp_path, 5)


def test_a_file_that_can_not_be_read_is_a_problem_not_a_crash(tmp_path, monkeypatch):
    folder = save(tmp_path, 5)

    def bad_sector(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "sha256", bad_sector)
    assert problem(folder) == "config.yaml can't be read: Input/output error"


def test_a_name_that_no_file_can_have_is_a_problem_not_a_crash(tmp_path):
    folder = save(tmp_path, 5)
    for name in ("x" * 5000, "x\0y"):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"][name] = "0"
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert re.search("can't be read|is missing", problem(folder))


def test_logs_that_can_not_be_cut_stop_every_process(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1}\n')

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logging, "write_atomically", refuse)
    alone = SimpleNamespace(is_main_process=True, num_processes=1)
    with pytest.raises(SaveFailed, match=r"metrics\.jsonl can't be rewritten: No space left on device"):
        logging.RunLog(alone, tmp_path, 5, 10)


def test_staging_folders_of_killed_processes_are_cleared(tmp_path):
    leftover = tmp_path / "ckpt" / ".staging-killed"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path, pytest.fail) == (None, [])
    save(tmp_path, 1)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step000001"]


@pytest.mark.parametrize("where", ["save_file", "torch.save", "sha256", "_fsync", "os.rename"])
def test_an_error_while_writing_leaves_the_previous_checkpoint_good(tmp_path, monkeypatch, where):
    good = save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"utils.checkpoint.{where}", full)
        with pytest.raises(SaveFailed, match="step 2 could not be written: No space left"):
            save(tmp_path, 2)
    assert problem(good) is None and newest(tmp_path, pytest.fail) == (good, [])
    again = save(tmp_path, 2)  # the same step can be written once there is room
    assert newest(tmp_path, pytest.fail) == (again, [])
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step000001", "step000002"]


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    checkpoint.write_atomically(path, lambda p: p.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.write_atomically(path, fails)
    assert path.read_text() == "old"
    checkpoint.write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# Damage


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
@pytest.mark.parametrize("name", [*PARTS, "manifest.json"])
def test_damage_is_noticed_and_named(tmp_path, name, how):
    folder = save(tmp_path, 5)
    damage(folder / name, how)
    why = problem(folder)
    if name == "manifest.json" and how == "flipped":
        assert why  # what the flipped sum belongs to
    else:
        assert name in why and ("missing" if how == "removed" else "damaged") in why


@pytest.mark.parametrize("text", [
    b"", b"not json", b"\xff\xfe\x00", b"null", b"[]", b"{}",
    b'{"sha256": {}}', b'{"sha256": null}', b'{"sha256": 5}', b'{"sha256": ["config.yaml"]}',
])  # fmt: skip
def test_a_garbage_manifest_is_a_problem_not_a_crash(tmp_path, text):
    folder = save(tmp_path, 5)
    (folder / "manifest.json").write_bytes(text)
    assert "manifest.json" in problem(folder)


@pytest.mark.parametrize("name", PARTS)
def test_a_manifest_that_leaves_a_file_out_is_not_good(tmp_path, name):
    folder = save(tmp_path, 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert name in problem(folder)


def test_newest_falls_back_to_the_last_good_checkpoint_and_says_so(tmp_path):
    folders = [save(tmp_path, step) for step in (2, 10, 999_999, 1_000_000)]  # names do not sort as text
    said = []
    assert newest(tmp_path, said.append) == (folders[3], []) and not said
    damage(folders[3] / "state.json", "flipped")
    damage(folders[2] / "manifest.json", "removed")
    assert newest(tmp_path, said.append) == (folders[1], [folders[3], folders[2]])
    assert "step1000000" in said[0] and "state.json" in said[0]
    assert "step999999" in said[1] and "manifest.json" in said[1] and len(said) == 2
    for folder in folders[:2]:
        damage(folder / "config.yaml", "truncated")
    assert newest(tmp_path, said.append)[0] is None
    assert all(folder.is_dir() for folder in folders)  # looking changes nothing


def test_a_checkpoint_under_the_name_of_another_step_is_noticed(tmp_path):
    save(tmp_path, 3).rename(tmp_path / "ckpt" / "step000007")
    assert "step 3" in problem(tmp_path / "ckpt" / "step000007")


def test_folders_set_aside_are_not_checkpoints(tmp_path):
    save(tmp_path, 1)
    aside = [checkpoint.quarantine(save(tmp_path, step), suffix) for step, suffix in ((2, "bad"), (3, "superseded"))]
    assert [path.name for path in aside] == ["step000002.bad", "step000003.superseded"]
    assert [path.name for path in published(tmp_path)] == ["step000001"]
    assert published(tmp_path / "nowhere") == [] and newest(tmp_path / "nowhere", pytest.fail) == (None, [])


@pytest.mark.parametrize("keep, best, left", [
    (2, None, [4, 5]), (1, None, [5]), (9, None, [1, 2, 3, 4, 5]), (None, None, [1, 2, 3, 4, 5]),
    (2, 1, [1, 4, 5]), (1, 5, [5]),
])  # fmt: skip
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        save(tmp_path, step)
    if best:
        (tmp_path / "ckpt" / "best").symlink_to(f"step{best:06d}")
    prune(tmp_path, keep)
    assert [checkpoint.step_of(path) for path in published(tmp_path)] == left
    assert all(problem(path) is None for path in published(tmp_path))
    names = {path.name for path in (tmp_path / "ckpt").iterdir()} - {"best"}
    assert names == {f"step{step:06d}" for step in left}


def test_prune_leaves_what_was_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    aside = checkpoint.quarantine(tmp_path / "ckpt" / "step000002", "bad")
    prune(tmp_path, 1)
    assert aside.is_dir() and [path.name for path in published(tmp_path)] == ["step000003"]


# Loading


@pytest.mark.parametrize("change, text", [
    (lambda w: w.pop("0.bias"), "1 tensors missing (0.bias)"),
    (lambda w: w.update(extra=torch.zeros(1)), "1 tensors not in the network (extra)"),
    (lambda w: w.update({"2.weight": torch.zeros(2, 5)}), "of another shape (2.weight: [2, 5], wanted [2, 4])"),
    (lambda w: w.update({"module.0.bias": w.pop("0.bias")}), "(module.0.bias)"),
])  # fmt: skip
def test_weights_of_another_architecture_say_what_differs(tmp_path, change, text):
    net, weights = network(), {name: tensor + 1 for name, tensor in network().state_dict().items()}
    change(weights)
    with pytest.raises(InputError, match=f"other.safetensors.*{re.escape(text)}"):
        load_weights(net, weights, tmp_path / "other.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), network().state_dict().values()))


def test_weights_of_the_same_architecture_load(tmp_path):
    net = network()
    load_weights(net, read_weights(save(tmp_path, 1, 3.0) / "ema.safetensors"), tmp_path)
    assert all(bool((parameter == 3).all()) for parameter in net.parameters())


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2]), None])
def test_weights_that_are_not_safetensors_are_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_payload_is_an_error_and_never_runs(tmp_path, zipped):
    marker, folder = tmp_path / "executed", save(tmp_path, 1)
    torch.save({"state": Payload(marker)}, folder / "optimizer.pt")
    if not zipped:
        (folder / "optimizer.pt").write_bytes(pickle.dumps({"state": Payload(marker)}))
    net = network()
    ema = build_ema(net, config.merge().train)
    with pytest.raises(Exception, match=r"(?i)weights.?only|unsupported"):
        read_optimizer(folder)
    with pytest.raises(InputError, match=r"optimizer\.pt"):
        training_state.restore(folder, SimpleNamespace(scaler=None), net, ema, torch.optim.AdamW(net.parameters()))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists()  # the payload is a real one


def test_verify_from_the_command_line(tmp_path, trained):
    copied = shutil.copytree(trained, tmp_path / "run")
    verify = lambda *args: subprocess.run(
        [sys.executable, "-m", "utils.checkpoint", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    done = verify("verify", copied)
    assert (done.returncode, done.stdout) == (0, "step000006  good\nstep000012  good\n")
    file = copied / "ckpt/step000006/ema.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    done = verify("verify", copied)
    assert done.returncode == 1 and "step000006  BAD: ema.safetensors is damaged" in done.stdout
    assert verify("verify", copied / "ckpt/step000012").returncode == 0
    for args in ([], ["verify", tmp_path / "nothing"], ["verify", tmp_path]):
        done = verify(*args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
