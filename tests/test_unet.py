"""The U-Net against diffusers' implementation, published counts and naive formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from models import MODELS, build_model
from models.layers import Attention, ResBlock, sinusoidal_embedding
from models.unet import UNet

CIFAR10 = {"image_size": 32, "dim": 128, "dim_mults": (1, 2, 2, 2), "attn_resolutions": (16,)}
SMALL = {"image_size": 16, "dim": 32, "dim_mults": (1, 2, 2), "attn_resolutions": (8,)}
TINY = {"dim": 8, "dim_mults": (1, 2), "attn_resolutions": (4,), "num_res_blocks": 1, "norm_groups": 4}


def randomised(network, seed=0):
    """Every parameter random, the near-zero and the zero ones too, at a scale that keeps the output of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
        parameter.data = noise + 1 if parameter.dim() == 1 and name.endswith("weight") else noise
    return network


def inputs(image_size, batch=3, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, image_size, image_size, generator=generator), torch.tensor([0, 17, 999])[:batch]


@pytest.mark.parametrize(
    ("shape", "parameters", "tensors"),
    [
        (CIFAR10, 35_746_307, 328),
        ({"image_size": 64, "dim_mults": (1, 2, 2, 2, 4)}, 78_700_803, 390),
        ({"image_size": 256, "dim_mults": (1, 1, 2, 2, 4, 4)}, 113_673_219, 450),
    ],
    ids=["cifar10", "celeba", "lsun"],
)
def test_size_of_the_published_networks(shape, parameters, tensors):
    with torch.device("meta"):
        network = UNet(**shape)
    sizes = [parameter.numel() for parameter in network.parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)
    assert len(network.state_dict()) == tensors
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert {(module.num_groups, module.eps, module.affine) for module in norms} == {(32, 1e-6, True)}


RENAMED = {  # ours (as in the authors' checkpoints) -> diffusers
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    ".block.": ".resnets.",
    ".attn.": ".attentions.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
}
IN_ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}


def to_diffusers(state, levels):
    result = {}
    for name, value in state.items():
        for ours, theirs in (IN_ATTENTION if ".attn" in name else {}).items():
            name = name.replace(ours, theirs)
            value = value.flatten(1) if value.dim() == 4 else value  # a 1x1 convolution is a linear layer there
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        side, *rest = name.split(".")
        if side == "down":
            name = ".".join(["down_blocks", *rest])
        elif side == "up":
            name = ".".join(["up_blocks", str(levels - 1 - int(rest[0])), *rest[1:]])
        result[name] = value
    return result


def diffusers_unet(image_size, dim, dim_mults, attn_resolutions, dropout=0.0):
    kinds = ["Attn" if image_size >> i in attn_resolutions else "" for i in range(len(dim_mults))]
    return UNet2DModel(
        sample_size=image_size,
        block_out_channels=[dim * mult for mult in dim_mults],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
        attention_head_dim=None,
        mid_block_scale_factor=1,
        act_fn="silu",
        dropout=dropout,
    )


@pytest.mark.parametrize(("shape", "batch"), [(SMALL, 3), (CIFAR10, 2)], ids=["small", "cifar10"])
def test_output_equals_diffusers(shape, batch):
    ours, theirs = randomised(UNet(**shape)).eval(), diffusers_unet(**shape).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), len(shape["dim_mults"])), strict=True)
    x, t = inputs(shape["image_size"], batch)
    with torch.no_grad():
        actual, expected = ours(x, t), theirs(x, t).sample
        assert 0.1 < expected.std() < 100
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        other = ours(x, t.flip(0))
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max(), "the network ignores t"


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_equals_a_naive_one(heads):
    layer = randomised(Attention(16, heads, groups=4)).double()
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, width = torch.empty(2, 16, 15).double(), 16 // heads
    h = layer.norm(x).flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", each.weight[:, :, 0, 0], h) + each.bias[:, None]
        for each in (layer.q, layer.k, layer.v)
    )
    for b in range(2):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[b, part].T @ k[b, part] / math.sqrt(width)  # [query, key]
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            expected[b, part] = (weights @ v[b, part].T).T
    out = torch.einsum("oc,bcn->bon", layer.proj_out.weight[:, :, 0, 0], expected) + layer.proj_out.bias[:, None]
    torch.testing.assert_close(layer(x), x + out.view_as(x), rtol=1e-9, atol=1e-9)


def test_heads_matter_and_cost_nothing():
    x, t = inputs(8)
    one, two = (randomised(UNet(8, **TINY, n_heads=heads)) for heads in (1, 2))
    assert [p.shape for p in one.parameters()] == [p.shape for p in two.parameters()]
    assert (one(x, t) - two(x, t)).abs().max() > 1e-4


def test_gradient_checkpointing_gives_identical_gradients():
    x, t = inputs(8)
    results = []
    for checkpointing in (False, True):
        network = randomised(UNet(8, **TINY, dropout=0.3, gradient_checkpointing=checkpointing)).train()
        calls = []
        for module in network.modules():
            if isinstance(module, ResBlock):
                module.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(7)
        out = network(x, t)
        forward = len(calls)
        out.square().mean().backward()
        assert len(calls) == forward * (2 if checkpointing else 1), "recomputed in the backward pass"
        results.append([out, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in results[0][1:])


def test_dropout_acts_in_train_mode_only():
    network, (x, t) = randomised(UNet(8, **TINY, dropout=0.5)), inputs(8)
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


def test_initialisation():
    """Fan-average uniform; almost zero for conv2, proj_out and conv_out, so that the output is almost zero too."""
    torch.manual_seed(0)
    network = UNet(**SMALL)
    x, t = inputs(16)
    assert 0 < network(x, t).abs().max() < 1e-3
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            area = module.weight[0, 0].numel()
            bound = math.sqrt(6 / (area * (module.weight.shape[0] + module.weight.shape[1])))
            small = name.endswith(("conv2", "proj_out", "conv_out"))
            largest = module.weight.abs().max().item()
            assert (0 < largest < 1e-4) if small else (0.95 * bound < largest <= bound * (1 + 1e-6)), name
            assert small or abs(module.weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.1, name
            assert not module.bias.any(), name


@pytest.mark.parametrize("dim", [4, 32, 128])
def test_time_embedding(dim):
    t, half = [0, 1, 17, 999], dim // 2
    frequencies = [math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)]
    expected = [[f(step * w) for f in (math.sin, math.cos) for w in frequencies] for step in t]
    embedding = sinusoidal_embedding(torch.tensor(t), dim)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=2e-4)  # float32 angles up to 999
    torch.testing.assert_close(embedding[:3], torch.tensor(expected[:3]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_channels_last_gives_the_same_output(heads):
    network, (x, t) = randomised(UNet(**SMALL, n_heads=heads)).eval(), inputs(16)
    with torch.no_grad():
        expected = network(x, t)
        of_input = network(x.contiguous(memory_format=torch.channels_last), t)
        network.to(memory_format=torch.channels_last)
        of_both = network(x.contiguous(memory_format=torch.channels_last), t)
    for actual in (of_input, of_both):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_do_not_see_each_other():
    network, (x, t) = randomised(UNet(8, **TINY)).eval().double(), inputs(8)
    together = network(x.double(), t)
    for i in range(3):
        torch.testing.assert_close(
            network(x[i : i + 1].double(), t[i : i + 1]), together[i : i + 1], rtol=1e-9, atol=1e-9
        )


def model_options(**changes):
    return SimpleNamespace(**{"name": "unet", **TINY, "n_heads": 1, "dropout": 0.2, **changes})


@pytest.mark.parametrize("channels", [1, 3])
def test_build_model(channels):
    x, t = inputs(8, channels=channels)
    plain, learned = (build_model(model_options(), 8, channels, learn_variance) for learn_variance in (False, True))
    assert plain(x, t).shape == (3, channels, 8, 8)
    assert learned(x, t).shape == (3, 2 * channels, 8, 8)
    assert (learned.image_size, learned.in_channels, learned.out_channels) == (8, channels, 2 * channels)
    assert {module.p for module in plain.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    differing = [n for n, p in plain.named_parameters() if p.shape != learned.get_parameter(n).shape]
    assert differing == ["conv_out.weight", "conv_out.bias"]


def test_options_reach_the_network():
    base = sum(p.numel() for p in build_model(model_options(), 8, 1).parameters())
    for change in ({"dim": 16}, {"dim_mults": [1, 1]}, {"attn_resolutions": [8, 4]}, {"num_res_blocks": 2}):
        assert sum(p.numel() for p in build_model(model_options(**change), 8, 1).parameters()) != base, change
    assert build_model(model_options(n_heads=2), 8, 1).mid.attn_1.heads == 2
    assert build_model(model_options(norm_groups=8), 8, 1).norm_out.num_groups == 8


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="'vit'") as error:
        build_model(model_options(name="vit"), 8, 1)
    assert all(name in str(error.value) for name in MODELS)
