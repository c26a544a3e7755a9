"""The CPU's normalisation kernel: its values and gradients, what they depend on, and where PyTorch steps in."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import norm_silu_cpu
from models.layers import ResBlock
from models.norm_silu import Norm
from models.unet import UNet

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def last(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def by_pytorch(x, emb, weight, bias, groups, silu):
    """In float64."""
    x = x if emb is None else x + emb[:, :, None, None]
    y = F.group_norm(x, groups, eps=1e-6)
    y = y * weight.view(-1, x.shape[1], 1, 1) + bias.view(-1, x.shape[1], 1, 1)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("own", [False, True], ids=["", "weights of each image"])
@pytest.mark.parametrize("B, C, H, G", [(3, 64, 8, 32), (1, 128, 16, 32), (2, 24, 7, 4), (2, 8, 3, 1), (2, 1, 5, 1)])
def test_values_and_gradients_are_those_of_float64(B, C, H, G, own, dtype, embedded, silu):
    torch.manual_seed(0)
    parameters = (B, C) if own else (C,)
    inputs = [2 * last(B, C, H, H, dtype=dtype) + 3, torch.randn(parameters), torch.randn(parameters)]
    inputs += [torch.randn(B, C).to(dtype)] if embedded else []
    dy, exact = torch.randn(B, C, H, H).to(dtype), [value.double().requires_grad_() for value in inputs]
    x, weight, bias, *emb = (value.requires_grad_() for value in inputs)
    y = norm_silu_cpu.norm_silu(x, *emb or [None], weight, bias, G, 1e-6, silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    X, W, b, *E = exact
    Y = by_pytorch(X, *E or [None], W, b, G, silu)
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    for ours, theirs in zip(found, [Y, *torch.autograd.grad(Y, exact, dy.double())], strict=True):
        assert (ours.double() - theirs).abs().max() < ROUNDING[dtype] * theirs.abs().max().clamp(min=1)
    with torch.no_grad():
        assert torch.equal(norm_silu_cpu.norm_silu(x, *emb or [None], weight, bias, G, 1e-6, silu), y)


def test_an_image_depends_neither_on_the_batch_nor_on_the_threads():
    x, emb, norm, threads = last(5, 64, 16, 16), torch.randn(5, 64), Norm(32, 64), torch.get_num_threads()
    whole = norm(x, emb, silu=True)
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            assert torch.equal(norm(x, emb, silu=True), whole)
            assert torch.equal(norm(x[3:4], emb[3:4], silu=True), whole[3:4])
    finally:
        torch.set_num_threads(threads)
    assert norm(x[:0], emb[:0], silu=True).shape == (0, 64, 16, 16)


def test_large_means_do_not_cancel():
    x = 1000 + last(2, 32, 16, 16)
    y = Norm(4, 32, eps=1e-6)(x)
    assert (y.double() - F.group_norm(x.double(), 4, eps=1e-6)).abs().max() < 1e-4
    x[0, :, 0, 0], x[1, :, 9, 9] = 1e4, -1e4  # nor around a pixel that is far from the others
    y = Norm(4, 32, eps=1e-6)(x)
    assert (y.double() - F.group_norm(x.double(), 4, eps=1e-6)).abs().max() < 1e-4


def test_any_layout_is_taken():
    x, norm = torch.randn(4, 64, 8, 8), Norm(32, 64)
    y = norm(x, silu=True)
    for same in (x.contiguous(memory_format=torch.channels_last), x.repeat(1, 2, 1, 1)[:, :64], x.mT.contiguous().mT):
        assert torch.equal(norm(same, silu=True), y)


def test_what_is_not_finite_stays_so():
    x = last(2, 32, 4, 4)
    x[0, 0, 0, 0], x[1, 8, 0, 0] = math.nan, math.inf
    for dtype in ROUNDING:
        y = Norm(4, 32)(x.to(dtype), silu=True)
        assert y[0, :8].isnan().all() and y[1, 8:16].isnan().any() and y[0, 8:].isfinite().all()
    far = torch.tensor([-1e30, -100, -80, 80, 100, 1e30]).view(1, 6, 1, 1)
    y = norm_silu_cpu.norm_silu(far, None, torch.zeros(6), far.flatten(), 1, 1.0, True)
    torch.testing.assert_close(y, F.silu(far), rtol=1e-6, atol=1e-30)
    bias = far.flatten().requires_grad_()
    slope = torch.autograd.grad(norm_silu_cpu.norm_silu(far, None, torch.zeros(6), bias, 1, 1.0, True).sum(), bias)[0]
    torch.testing.assert_close(slope, torch.tensor([0.0, 0, 0, 1, 1, 1]), rtol=0, atol=1e-30)


def test_an_adaptive_block_equals_the_plain_formula():
    torch.manual_seed(0)
    block = ResBlock(32, 32, 16, groups=8, dropout=0.0, adaptive=True)
    nn.init.normal_(block.conv2.weight, std=0.1)
    x, temb = last(3, 32, 8, 8), torch.randn(3, 16)
    scale, shift = block.temb_proj(temb)[:, :, None, None].chunk(2, 1)
    h = block.conv1(F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = F.group_norm(h, 8, block.norm2.weight, block.norm2.bias, 1e-6) * (1 + scale) + shift
    expected = x + block.conv2(F.silu(h))
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(x.contiguous(), temb), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.3])
def test_dropout_drops_and_scales(p):
    torch.manual_seed(0)
    x, norm, drop = last(16, 8, 33, 35), Norm(4, 8), nn.Dropout(p)
    x.requires_grad_()
    y, whole = norm(x, silu=True, dropout=drop), norm(x, silu=True)
    kept, n = y != 0, x.numel()
    assert abs((~kept).sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    torch.testing.assert_close(y, kept * whole / (1 - p), rtol=1e-6, atol=0)
    dy = torch.randn(x.shape)
    gradient = torch.autograd.grad(y, x, dy)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, x, dy * kept / (1 - p))[0], rtol=1e-5, atol=1e-6)
    for dim in range(4):  # neighbours are independent of each other
        together = (kept.narrow(dim, 1, x.shape[dim] - 1) & kept.narrow(dim, 0, x.shape[dim] - 1)).float().mean().item()
        assert abs(together - (1 - p) ** 2) < 0.01
    again = norm(x, silu=True, dropout=drop) != 0  # and so are calls
    assert abs((kept & again).float().mean().item() - (1 - p) ** 2) < 0.01
    assert torch.equal(norm(x, silu=True, dropout=drop.eval()), whole)


def test_dropout_is_a_function_of_the_generator():
    x, norm, layer = last(2, 8, 4, 4), Norm(4, 8), nn.Dropout(0.5)
    draw = lambda seed: (torch.manual_seed(seed), norm(x, dropout=layer))[1]
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    one = norm(x, dropout=nn.Dropout(1.0))
    assert torch.equal(one, torch.zeros_like(one))


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As on a machine that has none yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    norm_silu_cpu.library.cache_clear()
    yield tmp_path
    norm_silu_cpu.library.cache_clear()


def test_it_is_compiled_once(no_library, monkeypatch):
    assert norm_silu_cpu.library() is not None
    (built,) = no_library.glob("ddpm/*")
    made = built.stat().st_mtime_ns
    norm_silu_cpu.library.cache_clear()
    assert norm_silu_cpu.library() is not None and built.stat().st_mtime_ns == made
    monkeypatch.setattr(norm_silu_cpu, "_processor", lambda: "another")
    norm_silu_cpu.library.cache_clear()
    assert norm_silu_cpu.library() is not None and len(list(no_library.glob("ddpm/*"))) == 2


def test_a_damaged_file_is_made_again(no_library):
    norm_silu_cpu._built().write_bytes(b"damaged")
    assert norm_silu_cpu.library() is not None


@pytest.mark.parametrize("reason", ["no compiler", "it fails", "nowhere to keep it"])
def test_without_it_pytorch_does_the_work(no_library, monkeypatch, capfd, reason):
    torch.manual_seed(0)
    net = UNet(16, dim=32, dim_mults=(1, 2), attn_resolutions=(8,), num_res_blocks=1, norm_groups=8)
    nn.init.normal_(net.conv_out.weight, std=0.1)
    net = net.to(memory_format=torch.channels_last)
    x, t = last(2, 3, 16, 16), torch.tensor([3, 700])
    expected = net(x, t)
    assert norm_silu_cpu.takes(x)
    norm_silu_cpu.library.cache_clear()
    shutil.rmtree(no_library / "ddpm")
    if reason == "nowhere to keep it":
        (no_library / "ddpm").write_text("a file")
    else:
        monkeypatch.setenv("CXX", "no-such-compiler" if reason == "no compiler" else "false")
    assert not norm_silu_cpu.takes(x) and not norm_silu_cpu.takes(x)
    told = capfd.readouterr().err
    assert told.startswith("warning: norms are PyTorch's") and told.count("\n") == 1
    torch.testing.assert_close(net(x, t), expected, rtol=1e-4, atol=1e-4)
    assert reason == "nowhere to keep it" or not list(no_library.glob("ddpm/*"))


def test_what_it_does_not_take():
    x = last(2, 32, 8, 8)
    assert norm_silu_cpu.takes(x) and norm_silu_cpu.takes(x.bfloat16())
    for other in (x.double(), x.half(), x[:0], x.to("meta")):
        assert not norm_silu_cpu.takes(other)
    with FakeTensorMode():
        assert not norm_silu_cpu.takes(last(2, 32, 8, 8))
    norm = Norm(8, 32)
    assert torch.func.vmap(lambda image: norm(image[None], silu=True))(x).shape == (2, 1, 32, 8, 8)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(Norm(8, 32)(x, silu=True).sum(), x, create_graph=True)


def test_profiles_name_it():
    x, norm = last(2, 32, 8, 8), Norm(8, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(x, silu=True).sum().backward()
        with torch.no_grad():
            norm(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["ddpm::norm_silu"] == 2 and counts["ddpm::norm_silu_backward"] == 1
