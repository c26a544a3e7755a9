"""What makes runs fast must change nothing else: dropout, patches, filled batches, compilation, shares of the time."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from chaos import same_checkpoint
from conftest import TINY, run
from in_process import call
from safetensors.torch import load_file
from test_generate import INDICES, PROCESS, STEPS, options, unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_ddpm
from diffusions.cuda_graph import Graphed
from diffusions.generate import generate
from diffusions.process import GaussianDiffusion
from models import build_model
from models.flops import forward_flops
from models.layers import twice_the_size
from models.patch_unet import PatchUNet
from models.unet import UNet
from utils import compilation, config, logging, precision, utilisation
from utils.weights import load_network, open_weights

BF16 = torch.bfloat16


def test_flops_are_those_of_a_forward_pass():
    options = SimpleNamespace(
        name="unet", dim=128, dim_mults=[1, 2, 2, 2], attn_resolutions=[16], num_res_blocks=2, n_heads=1,
        norm_groups=32, dropout=0.1,
    )  # fmt: skip
    with torch.device("meta"):
        assert forward_flops(build_model(options, 32, 3)) == pytest.approx(12.44e9, rel=1e-3)
    net = unet()
    net.compile()
    found = forward_flops(net)
    net.double()  # all of it PyTorch's own operations, which the counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.compiler.disable(net.forward)(torch.randn(1, 3, 8, 8).double(), torch.zeros(1, dtype=torch.int64))
    assert found == counter.get_total_flops()


def test_weights_that_are_kept_cast_give_the_same_images():
    images = lambda net: torch.cat([b.images for b in generate(net, PROCESS, options(), INDICES, 1, 4, dtype=BF16)])
    net, expected = unet(), images(unet())
    precision.keep_cast(net, None)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    precision.keep_cast(net, BF16)
    assert net.conv_in.weight.dtype == BF16 and net.norm_out.weight.dtype == torch.float32
    assert torch.equal(images(net), expected)
    assert forward_flops(net) == forward_flops(unet())


def test_patch_unet_sees_each_pixel_and_has_the_variance_second():
    torch.manual_seed(0)
    small = SimpleNamespace(
        name="patch_unet", dim=8, dim_mults=[1, 2], attn_resolutions=[4], num_res_blocks=1, n_heads=1, norm_groups=4,
        dropout=0.0,
    )  # fmt: skip
    net = build_model(small, 16, 1, learn_variance=True).eval()
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, t = torch.randn(2, 1, 16, 16, requires_grad=True), torch.tensor([3, 900])
    out = net(x, t)
    assert out.shape == (2, 2, 16, 16) and (net.image_size, net.in_channels) == (16, 1)
    (gradient,) = torch.autograd.grad(out[:, :1, 5, 7].sum(), x)
    assert (gradient != 0).flatten(1).all()  # attention sees everything
    process = GaussianDiffusion(PROCESS.alpha_bar, learn_variance=True)
    batches = list(generate(net, process, options(sampler="learned-range"), range(3), 0, 2))
    assert torch.cat([b.images for b in batches]).shape == (3, 1, 16, 16)


def test_patch_unet_through_the_command_line(tmp_path):
    small = ["--model.name", "patch_unet", "--model.dim_mults", "[1]", "--model.attn_resolutions", "[4]"]
    run("train_ddpm.py", "-e", tmp_path / "run", *TINY, *small, "--train.n_steps", 3, cwd=tmp_path)
    run("sample_ddpm.py", "--weights", tmp_path / "run", "--n_samples", 3, "--save_dir", tmp_path / "out", cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    done = run("convert_ddpm.py", "--weights", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "d",
               cwd=tmp_path, status=2)  # fmt: skip
    assert "model.name = patch_unet" in done.stderr
    done = run("train_ddpm.py", "-e", tmp_path / "no", *TINY, *small, "--data.image_size", 7, cwd=tmp_path, status=2)
    assert "multiple of 2" in done.stderr


class Counted(nn.Module):
    """Counts the batch sizes that a network meets, and calls itself compiled."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sizes = net, []
        self.image_size, self.in_channels = net.image_size, net.in_channels
        self._compiled_call_impl = None

    def forward(self, x, t):
        self.sizes.append(len(x))
        return self.net(x, t)


def test_a_compiled_network_meets_one_batch_size():
    net = unet()
    plain = torch.cat([b.images for b in generate(net, PROCESS, options(), INDICES, 3, 7)])
    counted = Counted(net)
    counted._compiled_call_impl = counted._call_impl  # as nn.Module.compile leaves it
    batches = list(generate(counted, PROCESS, options(), INDICES, 3, 7, n_frames=2))
    assert counted.sizes == [7] * 3 * STEPS
    assert torch.cat([b.indices for b in batches]).tolist() == INDICES
    assert (torch.cat([b.images for b in batches]).int() - plain.int()).abs().max() <= 1
    assert [len(b.frames) for b in batches] == [7, 7, 2]


def test_on_a_cpu_a_graphed_network_is_the_network():
    net = unet()
    graphed, x, t = Graphed(net, 100), torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        assert all(torch.equal(graphed(x, t), net(x, t)) for _ in range(4)) and not graphed.graphs
    assert graphed.image_size == 8 and not hasattr(graphed, "nothing")


@pytest.mark.parametrize(
    ("asked", "gpu", "flops", "wanted"),
    [("auto", True, 1e17, True), ("auto", True, 1e13, False), ("auto", False, 1e20, False), ("true", False, 0, True),
     ("false", True, 1e20, False)],
)  # fmt: skip
def test_compilation_is_decided_by_the_work(monkeypatch, asked, gpu, flops, wanted):
    monkeypatch.setattr(precision, "on_gpu", lambda: gpu)
    assert precision.wants_compile(asked, lambda: flops) is wanted


def test_training_flops_come_from_the_configuration(monkeypatch):
    cfg = config.merge(("test", {"train.n_steps": 10, "train.batch_size": 4, "data.image_size": 16}))
    assert precision.training_flops(cfg) == 3 * 10 * 4 * utilisation.network_flops(cfg)
    assert precision.training_flops(config.merge(("test", {"train.n_epochs": 2}))) == math.inf
    of_class = config.merge(("test", {"model.condition": "class"}))  # whose classes are known with the data only
    whole = precision.training_flops(config.merge())
    assert precision.training_flops(of_class) == whole
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert precision.training_flops(of_class) == whole / 4  # of one process


def test_the_rate_leaves_out_the_measurement_of_the_machine(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(logging, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def measured(rate):
        clock.now += 7
        return {"mfu": rate / 100}

    log = object.__new__(logging.RunLog)
    log.clock, log.clock_step, log.utilisation, log.recompiles = 0.0, 0, measured, dict
    for step in (5, 10):
        clock.now += 2
        assert log.rate(step, 4) == {"images_per_second": 10.0, "mfu": 0.1}


def test_utilisation(monkeypatch):
    monkeypatch.setattr(utilisation, "matmul_rate", lambda device, dtype: 6e12)
    monkeypatch.setattr(utilisation, "network_flops", lambda config: 1e9)
    monkeypatch.setattr(utilisation, "AFTER", 1000.0)
    two = SimpleNamespace(device=torch.device("cpu"), num_processes=2, mixed_precision="no")
    found = utilisation.Utilisation(None, two)
    assert found(100.0) == {}
    found.started -= 1001
    assert found(1000.0) == {"mfu": 0.25} and found(2000.0) == {"mfu": 0.5}  # 2 x 6e12 / 3e9 = 4,000 images/s at best
    assert utilisation.matmul_rate(torch.device("cpu"), torch.float32) > 1e8


def test_a_network_that_leaves_no_memory_for_it_is_trained_without_a_utilisation(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(utilisation, "AFTER", 0)
    monkeypatch.setattr(utilisation, "matmul_rate", full)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision="no")
    found = utilisation.Utilisation(config.merge(), accelerator)
    assert found(1000.0) == {} and found(1000.0) == {}


def test_graphs_beyond_the_first_are_counted():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recompiles, net = compilation.Recompiles(), nn.Linear(3, 3)
    assert recompiles() == {}
    net.compile(backend="eager")
    net(torch.zeros(2, 3))
    assert recompiles() == {"recompiles": 0}
    net(torch.zeros(2, 3))
    assert recompiles() == {"recompiles": 0}
    net(torch.zeros(5, 3))
    assert recompiles() == {"recompiles": 1}


def test_compiled_code_is_kept_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    cfg = config.merge(("test", {"evaluate.cache_dir": str(tmp_path)}))
    compilation.compile_network(nn.Linear(3, 3), cfg)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    compilation.compile_network(nn.Linear(3, 3), cfg)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "elsewhere")


def error_against_fp32(cls, adaptive, change) -> tuple[float, float]:
    """(root mean square, largest) difference over the root mean square of the output, of a network that does much."""
    torch.manual_seed(0)
    net = cls(16, 3, 3, dim=64, dim_mults=(1, 2), attn_resolutions=(8,), norm_groups=8, adaptive_norm=adaptive).eval()
    x, t = torch.randn(8, 3, 16, 16), torch.randint(0, 1000, (8,))
    with torch.no_grad():
        for value in net.parameters():
            value += 0.05 * torch.randn_like(value)
        exact = net(x, t)
        difference = change(net)(x, t).float() - exact
    scale = exact.square().mean().sqrt()
    return (difference.square().mean().sqrt() / scale).item(), (difference.abs().max() / scale).item()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("cls", [UNet, PatchUNet])
def test_bf16_is_fp32_within_its_bound(cls, adaptive):
    rms, largest = error_against_fp32(cls, adaptive, torch.autocast("cpu", torch.bfloat16))
    assert 1e-4 < rms < 0.03 and largest < 0.15  # as docs/performance.md states


@pytest.mark.slow
def test_a_compiled_network_is_the_eager_one():
    assert max(error_against_fp32(UNet, True, torch.compile)) < 1e-4


@pytest.mark.slow
def test_a_compiled_training_resumes_bit_for_bit_and_compiles_nothing_twice(tmp_path):
    args = [*TINY, "--train.compile", "true", "--train.save_every", 4, "--train.valid_every", 3, "--train.n_steps", 8]
    run("train_ddpm.py", "-e", "run", *args, cwd=tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/ckpt/step000008")
    run("train_ddpm.py", "-e", "again", "-r", "auto", cwd=tmp_path)
    same_checkpoint(tmp_path / "run/ckpt/step000008", tmp_path / "again/ckpt/step000008")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["recompiles"] for row in rows if "recompiles" in row] == [0] * 8


def test_previews_validation_and_training_see_no_more_images_at_a_time_than_train_micro_batch(tmp_path, monkeypatch):
    sizes, forward = [], UNet.forward

    def watched(self, x, t, **cond):
        sizes.append(len(x))
        return forward(self, x, t, **cond)

    monkeypatch.setattr(UNet, "forward", watched)
    args = [*TINY, "--train.n_steps", 2, "--train.micro_batch", 3, "--train.n_samples", 7, "--train.log_with", "none"]
    call(train_ddpm.main, "-e", "run", *args, cwd=tmp_path)
    assert max(sizes) == 3


def test_a_network_that_is_loaded_draws_no_weights(trained):
    weights, before = open_weights(str(trained), None, []), torch.get_rng_state()
    net = load_network(weights, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    stored = load_file(weights.file)
    assert stored and all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())


def test_twice_the_size_is_nearest_neighbour():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(twice_the_size(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_profiles(tmp_path):
    args = ["-e", "run", *TINY, "--train.n_steps", 28, "--train.profile", "true"]
    told = run("train_ddpm.py", *args, cwd=tmp_path).stderr
    assert "ms per step, steps 6 to 20" in told
    for name in ("network, forward and backward", "data, noise, conditions", "optimizer", "EMA", "logs, previews"):
        assert name in told
    shares = [float(line.split("%")[0]) for line in told.splitlines() if "% " in line and " ms  " in line]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5)
    assert json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]
    assert "ProfilerStep" not in told
    told = run("train_ddpm.py", "-e", "run", "-r", "auto", "--train.n_steps", 50, cwd=tmp_path).stderr
    assert "profile     needs 27 steps of one start, this one had 22" in told and "trace  " not in told
    args = ["--weights", "run", "--n_samples", 3, "--save_dir", "out", "--profile"]
    told = run("sample_ddpm.py", *args, cwd=tmp_path).stdout
    assert "network" in told and "PNG writers" in told
    assert json.loads((tmp_path / "out-trace.json").read_text())["traceEvents"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{i:06d}.png" for i in range(3)} | {"protocol.json"}
