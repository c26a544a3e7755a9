"""train.shard on two gloo processes: the same training as without, in checkpoints that either kind goes on from."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ema_pytorch  # noqa: F401 (this and those below that seem unused: once here, instead of in every fork)
import pytest
import sklearn.datasets  # noqa: F401
import torch
import torch.distributed.fsdp
from chaos import same_checkpoint
from conftest import TINY
from in_process import call, forked, refused
from safetensors.torch import load_file

import train_ddpm
from diffusions.process import GaussianDiffusion
from utils import checkpoint, data, logging, precision  # noqa: F401

ARGS = [*TINY, "--train.mixed_precision", "no", "--train.micro_batch", 3, "--model.dropout", 0]
ARGS += ["--model.num_res_blocks", 1]
ARGS += ["--train.log_with", "none"]
ARGS += ["--train.n_steps", 8, "--train.save_every", 4, "--train.valid_every", 4, "--train.n_valid", 5]
ARGS += ["--train.sample_every", 8, "--train.n_samples", 3, "--train.clip_grad_norm", 0.1, "--train.warmup_steps", 0]
SHARD = ["--train.shard", "true"]


def train(*args: object, cwd: Path, processes: int = 2, prepare: Callable = lambda: None) -> None:
    """train_ddpm.py without its curves, whose drawing takes longer than the training."""

    def prepared() -> None:
        logging.draw_curves = lambda *_: None
        prepare()

    forked(train_ddpm.main, *args, cwd=cwd, processes=processes, prepare=prepared)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run: Path, name: str) -> list[float]:
    return [row[name] for row in rows(run) if name in row]


def same(one: Path, other: Path, step: int = 8) -> None:
    """Losses and what is in the checkpoint, up to rounding; Adam divides by what is near zero early on."""
    for name in ("loss", "grad_norm", "valid_loss", "valid_loss_ema"):
        assert column(one, name) == pytest.approx(column(other, name), abs=1e-5), name
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = (load_file(run / "ckpt" / checkpoint.folder_name(step) / name) for run in (one, other))
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value.shape == b[key].shape and torch.allclose(value, b[key], atol=2e-4), (name, key)
    a, b = (checkpoint.read_optimizer(run / "ckpt" / checkpoint.folder_name(step)) for run in (one, other))
    assert a["state"].keys() == b["state"].keys() and a["param_groups"] == b["param_groups"]
    for i, held in a["state"].items():
        for key, value in held.items():
            assert type(value) is torch.Tensor and torch.allclose(value, b["state"][i][key], atol=1e-5), (i, key)


def record_sizes() -> None:
    """Write how many numbers this process holds: of weights, average, moments and gradients."""
    original = train_ddpm.__dict__["train"]

    def watched(run):
        from utils import training_state

        save = training_state.save

        def recorded(run, step, accelerator, sharding, net, ema, optimizer, *args, **kwargs):
            local = lambda tensors: sum(getattr(t, "_local_tensor", t).numel() for t in tensors)
            moments = [v for held in optimizer.state.values() for n, v in held.items() if n != "step"]
            found = {"net": local(net.parameters()), "ema": local(ema.ema_model.parameters()), "adam": local(moments)}
            found["all"] = sum(p.numel() for p in net.parameters())
            Path(f"sizes{os.environ['RANK']}.json").write_text(json.dumps(found))
            return save(run, step, accelerator, sharding, net, ema, optimizer, *args, **kwargs)

        training_state.save = recorded
        return original(run)

    train_ddpm.train = watched


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    train("-e", "plain", *ARGS, cwd=folder)
    train("-e", "shard", *ARGS, *SHARD, cwd=folder, prepare=record_sizes)
    return folder


def test_a_divided_training_is_the_undivided_one(runs: Path) -> None:
    same(runs / "shard", runs / "plain")
    assert (runs / "shard/samples/step000008.png").read_bytes() == (runs / "plain/samples/step000008.png").read_bytes()


def test_every_process_holds_about_half(runs: Path) -> None:
    first, second = (json.loads((runs / f"sizes{rank}.json").read_text()) for rank in (0, 1))
    for part, copies in (("net", 1), ("ema", 1), ("adam", 2)):
        assert first[part] + second[part] == copies * first["all"]
        assert 0.4 < first[part] / (copies * first["all"]) < 0.6


def record_held() -> None:
    """Write, per micro-batch, whether gradients came divided from the one before, and the part of the kernels' numbers
    that autograd holds whole between the forward and the backward pass."""
    loss, found = GaussianDiffusion.loss, []

    def watched(self, model, x0, t, eps):
        if not model.training:
            return loss(self, model, x0, t, eps)
        divided = all(hasattr(p.grad, "full_tensor") for p in model.parameters())
        kernels = {p.shape: p.numel() for p in model.parameters() if p.ndim == 4}
        saved = {}

        def pack(value):
            if value.shape in kernels:
                saved[value.untyped_storage().data_ptr()] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            result = loss(self, model, x0, t, eps)
        held = sum(kernels[value.shape] for value in saved.values() if value.untyped_storage().size())
        found.append((divided, held / sum(p.numel() for p in model.parameters() if p.ndim == 4)))
        Path(f"held{os.environ['RANK']}.json").write_text(json.dumps(found))
        return result

    GaussianDiffusion.loss = watched


def test_bf16_is_the_precision_of_the_undivided_one(tmp_path: Path) -> None:
    args = [*ARGS, "--train.mixed_precision", "bf16", "--train.n_steps", 4, "--model.dim", 16]
    for name, more, prepare in (("plain", [], lambda: None), ("shard", SHARD, record_held)):
        train("-e", name, *args, *more, cwd=tmp_path, prepare=prepare)
    plain, shard = (column(tmp_path / name, "loss") for name in ("plain", "shard"))
    assert shard == pytest.approx(plain, abs=1e-4)  # bf16 itself is 1e-3
    for rank in (0, 1):
        held = json.loads((tmp_path / f"held{rank}.json").read_text())
        assert [divided for divided, _ in held] == [False, True, True] * 4  # 8 images as 3 + 3 + 2
        assert max(part for _, part in held) < 0.3  # the layers outside of blocks; all of it where autocast casts


def test_dropout_and_gradient_checkpointing_go_together_with_it(tmp_path: Path) -> None:
    args = [*ARGS, "--model.dropout", 0.3, "--train.n_steps", 4]
    for name, more in (("plain", []), ("shard", [*SHARD, "--train.gradient_checkpointing", "true"])):
        train("-e", name, *args, *more, cwd=tmp_path)
    same(tmp_path / "shard", tmp_path / "plain", step=4)


@pytest.mark.parametrize(("begun", "ended"), [("shard", "one"), ("plain", "shard"), ("shard", "shard")])
def test_a_checkpoint_of_either_kind_goes_on_as_the_other(runs: Path, tmp_path: Path, begun: str, ended: str) -> None:
    shutil.copytree(runs / begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt/step000008")
    args = ["-e", "run", "-r", "auto", "--train.shard", str(ended == "shard").lower()]
    train(*args, cwd=tmp_path, processes=1 if ended == "one" else 2)
    same(tmp_path / "run", runs / "plain")
    if begun == ended:  # bit for bit
        same_checkpoint(tmp_path / "run/ckpt/step000008", runs / begun / "ckpt/step000008")


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    def poison() -> None:
        loss, calls = GaussianDiffusion.loss, []

        def poisoned(self, model, x0, t, eps):
            calls.append(0)
            bad = len(calls) == 4 and os.environ["RANK"] == "1"
            return loss(self, model, x0, t, eps) * (torch.nan if bad else 1)

        GaussianDiffusion.loss = poisoned

    args = [*ARGS, "--train.micro_batch", 8, "--train.n_steps", 5, "--train.valid_every", 100, *SHARD]
    train("-e", "run", *args, cwd=tmp_path, prepare=poison)
    assert column(tmp_path / "run", "bad_steps") == [0, 0, 0, 1, 0]
    weights = load_file(tmp_path / "run/ckpt/step000005/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_alone_nothing_is_divided(tmp_path: Path) -> None:
    call(train_ddpm.main, "-e", "run", *ARGS, *SHARD, "--train.n_steps", 2, cwd=tmp_path)
    assert checkpoint.published(tmp_path / "run")


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for args, says in ((["--train.mixed_precision", "fp16"], "loss scaler"), (["--train.compile", "true"], "compile")):
        refused(train_ddpm.main, *SHARD, *args, cwd=tmp_path, says=["train.shard = true", says])


def test_the_launchers_precision_counts_where_none_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refused(train_ddpm.main, *SHARD, cwd=tmp_path, says=["train.shard = true", "loss scaler"])
    call(train_ddpm.main, *SHARD, "--train.mixed_precision", "bf16", "--print_config", cwd=tmp_path)


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_a_launcher_with_an_engine_of_its_own_is_told_so(tmp_path: Path, monkeypatch, engine: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    refused(train_ddpm.main, "-e", "run", *ARGS, cwd=tmp_path, says=[engine, "MULTI_GPU", "--train.shard true"])
