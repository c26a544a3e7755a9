"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py`. Kernels, graphs, compilation, fp16, resuming."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffusions import build_process, generate
from diffusions.cuda_graph import Graphed
from diffusions.noise import randn
from models import build_model
from models.norm_silu import norm_silu

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"name": "unet", "dim": 32, "dim_mults": [1, 2], "attn_resolutions": [8], "num_res_blocks": 1, "n_heads": 1}
PROCESS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "total_steps": 1000}
PROCESS |= {"zero_terminal_snr": False, "objective": "pred_eps", "learn_variance": False, "loss_weighting": "none"}
DDIM = SimpleNamespace(sampler="ddim", skip_type="uniform", skip_steps=10, eta=0.0, clip_denoised=True)


def small_net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = build_model(SimpleNamespace(**SMALL, norm_groups=8, dropout=0.0), 16, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # so that the last layers do not start at zero
    return net.cuda().to(memory_format=torch.channels_last).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("B, C, H, G", [(3, 128, 32, 32), (64, 384, 16, 32), (1, 128, 96, 32), (5, 30, 7, 3)])
@pytest.mark.parametrize("silu", [True, False])
def test_norm_silu_equals_pytorch_in_float64(B, C, H, G, dtype, close, silu):
    torch.manual_seed(0)
    x = (torch.randn(B, C, H, H, device="cuda") * 2 + 3).to(dtype).to(memory_format=torch.channels_last)
    emb, dy = torch.randn(B, C, device="cuda").to(dtype), torch.randn_like(x)
    norm = torch.nn.GroupNorm(G, C, eps=1e-6).cuda()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for add in (None, emb):
        inputs = [value.clone().requires_grad_() for value in (x, *([] if add is None else [add]))]
        y = norm_silu(norm, *inputs, silu=silu)
        got = [y, *torch.autograd.grad(y, [*inputs, norm.weight, norm.bias], dy)]
        exact = [value.detach().double().requires_grad_() for value in inputs]
        double = torch.nn.GroupNorm(G, C, eps=1e-6).cuda().double()
        double.load_state_dict(norm.state_dict())
        z = double(exact[0] if add is None else exact[0] + exact[1][:, :, None, None])
        z = F.silu(z) if silu else z
        wanted = [z, *torch.autograd.grad(z, [*exact, double.weight, double.bias], dy.double())]
        for ours, right in zip(got, wanted):
            assert (ours.double() - right).norm() <= close * right.norm()


def test_norm_silu_repeats_bit_for_bit_and_survives_large_activations():
    norm = torch.nn.GroupNorm(32, 256).cuda()
    x = (1000 + torch.randn(8, 256, 16, 16, device="cuda")).half().to(memory_format=torch.channels_last)
    first, again = norm_silu(norm, x), norm_silu(norm, x)
    assert first.isfinite().all() and torch.equal(first, again)
    torch.testing.assert_close(first.float(), F.silu(norm(x.float())), atol=2e-2, rtol=2e-2)


def test_noise_is_that_of_the_cpu():
    index = torch.tensor([0, 1, 7, 2**33 + 5])
    for seed, draw, shape in ((0, 0, (3, 32, 32)), (2**63 - 1, 2**31 + 3, (1, 5, 7)), (2022, 1, (1,))):
        assert torch.equal(randn(seed, index, draw, shape, "cuda").cpu(), randn(seed, index, draw, shape))


def test_graphs_and_compilation_change_no_image_by_more_than_a_level():
    net, process = small_net(), build_process(SimpleNamespace(**PROCESS))
    torch.backends.cudnn.allow_tf32 = False  # as sample_ddpm.py does for float32
    draw = lambda net, size, dtype: torch.cat(
        [b.images for b in generate(net, process, DDIM, range(21), 7, size, dtype=dtype)]
    )
    plain = draw(net, 1, None)
    for size in (21, 8):
        assert (draw(net, size, None).int() - plain.int()).abs().max() <= 1
    eager = draw(net, 8, torch.bfloat16).int()
    net.compile()
    assert (draw(net, 8, None).int() - plain.int()).abs().max() <= 1
    assert (draw(net, 8, torch.bfloat16).int() - eager).abs().float().mean() < 1


def test_a_replayed_graph_equals_the_call():
    net, x = small_net(), torch.randn(4, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    graphed = Graphed(net, 100)
    with torch.no_grad():
        for t in range(6):
            steps = torch.full((4,), 100 * t, device="cuda")
            torch.testing.assert_close(graphed(x + t, steps), net(x + t, steps))
    assert len(graphed.graphs) == 1


def run(*args) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_deterministic_run_resumes_bit_for_bit(tmp_path, precision):
    args = ["train_ddpm.py", "-c", "configs/ddpm_digits.yaml", "--train.mixed_precision", precision]
    args += ["--train.deterministic", "true", "--model.dropout", "0.1", "--train.n_steps", "30"]
    args += ["--train.save_every", "15", "--train.log_every", "5", "--train.sample_every", "100"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(*args, "-e", whole)
    run(*args, "-e", halves, "--train.max_hours", "0.000001")
    run("train_ddpm.py", "-e", halves, "-r", "auto", "--train.max_hours", "null")
    for name in ("model", "ema"):
        a, b = (load_file(place / "ckpt" / "step000030" / f"{name}.safetensors") for place in (whole, halves))
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("bad_steps", 0) <= 3 for row in rows)  # fp16 may skip some while its scale settles
