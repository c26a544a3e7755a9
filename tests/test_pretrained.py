"""Other projects' checkpoints, made by diffusers' own network, give its outputs when loaded here."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from test_unet import diffusers_unet, inputs, randomised

from models import pretrained
from models.unet import UNet
from utils.errors import InputError
from utils.weights import load_network, open_weights

SMALL = {"image_size": 32, "dim": 32, "dim_mults": (1, 2, 2), "attn_resolutions": (16,)}
PUBLISHED = {  # image size, multiples of 128 channels; parameters, tensors
    "cifar10": (32, (1, 2, 2, 2), 35_746_307, 328),
    "celeba": (64, (1, 2, 2, 2, 4), 78_700_803, 390),
    "lsun": (256, (1, 1, 2, 2, 4, 4), 113_673_219, 450),
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def released(network: UNet2DModel) -> dict[str, torch.Tensor]:
    """A diffusers network under the names of the DDPM release (written down here once more, name by name)."""
    levels, state = len(network.config.block_out_channels), {}
    blocks = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
    blocks |= {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    theirs = network.state_dict()

    def put(ours: str, name: str, parts: dict[str, str]) -> None:
        for own, other in parts.items():
            for end in ("weight", "bias"):
                if f"{name}.{other}.{end}" in theirs:
                    value = theirs[f"{name}.{other}.{end}"]
                    square = parts is attention and value.dim() == 2
                    state[f"{ours}.{own}.{end}"] = value[..., None, None].clone() if square else value

    put("temb.dense", "time_embedding", {"0": "linear_1", "1": "linear_2"})
    for own, other in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
        for end in ("weight", "bias"):
            state[f"{own}.{end}"] = theirs[f"{other}.{end}"]
    for i in range(levels):
        for side, place in (("down", f"down_blocks.{i}"), ("up", f"up_blocks.{levels - 1 - i}")):
            for j in range(network.config.layers_per_block + 1):
                put(f"{side}.{i}.block.{j}", f"{place}.resnets.{j}", blocks)
                put(f"{side}.{i}.attn.{j}", f"{place}.attentions.{j}", attention)
            put(f"{side}.{i}.{side}sample", f"{place}.{side}samplers.0", {"conv": "conv"})
    put("mid.block_1", "mid_block.resnets.0", blocks)
    put("mid.attn_1", "mid_block.attentions.0", attention)
    put("mid.block_2", "mid_block.resnets.1", blocks)
    assert len(state) == len(theirs)
    return state


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The attention of diffusers' first releases."""
    for new, old in OLD_NAMES.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    return state


def ckpt_pth(ema: dict, raw: dict) -> list:
    """What the DDIM authors' trainer saves."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    return [{f"module.{name}": value for name, value in raw.items()}, adam.state_dict(), 7, 5000, ema]


def write(network: UNet2DModel, folder: Path, layout: str) -> Path:
    """The network as a file or folder of another project."""
    folder.mkdir()
    state, file = network.state_dict(), folder / layout
    if layout == "ckpt.pth":
        ema = released(network)
        torch.save(ckpt_pth(ema, {name: value + 1 for name, value in ema.items()}), file)
    elif layout in ("model-790000.ckpt", "legacy.pth"):
        torch.save(released(network), file, _use_new_zipfile_serialization=layout != "legacy.pth")
    elif layout == "names.safetensors":
        save_file(state, file)
    elif layout == "names.bin":
        torch.save(old_names(state), file)
    elif layout == "pipeline":
        DDPMPipeline(network, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
        return folder
    elif layout == "unet":
        network.save_pretrained(folder)
        return folder
    elif layout == "at the root":  # as google/ddpm-cifar10-32: no subfolders, the old attention, pickled
        network.save_config(folder)
        DDPMScheduler(variance_type="fixed_large").save_config(folder)
        torch.save(old_names(state), folder / "diffusion_pytorch_model.bin")
        (folder / "model_index.json").write_text(
            '{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}'
        )
        return folder
    return file


LAYOUTS = ["ckpt.pth", "model-790000.ckpt", "legacy.pth", "names.safetensors", "names.bin", "pipeline", "unet"]
LAYOUTS += ["at the root"]


def opened(path: Path, load_ema: bool | None = None, **keys: object):
    return open_weights(str(path), load_ema, [("test", {name.replace("__", "."): v for name, v in keys.items()})])


def assert_equal_outputs(ours, theirs, x, t) -> None:
    with torch.no_grad():
        expected = theirs.eval()(x, t).sample
        assert 0.1 < expected.std() < 100
        assert (ours(x, t) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def small() -> UNet2DModel:
    return randomised(diffusers_unet(**SMALL))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_diffusers_outputs(tmp_path, capsys, small, layout):
    weights = opened(write(small, tmp_path / "there", layout))
    config, told = weights.config, capsys.readouterr().err
    assert weights.kind == ("EMA" if layout == "ckpt.pth" else "only")
    assert (config.data.image_size, config.data.channels, list(config.model.attn_resolutions)) == (32, 3, [16])
    diffusion = config.diffusion
    assert (diffusion.total_steps, diffusion.beta_schedule, diffusion.beta_end) == (1000, "linear", 0.02)
    assert config.sample.sampler == "fixed-large"
    assert ("data.image_size = 32" in told) == (layout not in ("pipeline", "unet", "at the root"))
    assert ("diffusion.beta_end = 0.02" in told) == (layout not in ("pipeline", "at the root"))
    assert_equal_outputs(load_network(weights, "cpu"), small, *inputs(32))


@pytest.mark.parametrize(
    ("name", "layout", "size"),
    [("cifar10", "model-790000.ckpt", 32), ("celeba", "ckpt.pth", 64), ("lsun", "at the root", 64)],
)
def test_published_shapes_give_diffusers_outputs(tmp_path, name, layout, size):
    """LSUN's network, whose attention belongs to a level and not to a size, is fed a quarter of its images' width."""
    image_size, mults, parameters, tensors = PUBLISHED[name]
    theirs = randomised(diffusers_unet(image_size, 128, mults, (16,)))
    if layout == "ckpt.pth":
        (tmp_path / "there").mkdir()
        state = released(theirs)
        torch.save(ckpt_pth(state, state), tmp_path / "there/ckpt.pth")
        path = tmp_path / "there/ckpt.pth"
    else:
        path = write(theirs, tmp_path / "there", layout)
    weights = opened(path)
    assert weights.config.data.image_size == image_size
    ours = load_network(weights, "cpu")
    sizes = [parameter.numel() for parameter in ours.parameters()]
    assert (sum(sizes), len(sizes)) == (parameters, tensors)
    assert_equal_outputs(ours, theirs, *inputs(size, batch=1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published_networks_both_ways(name):
    image_size, mults, _, tensors = PUBLISHED[name]
    with torch.device("meta"):
        ours = UNet(image_size=image_size, dim_mults=mults).state_dict()
        theirs = diffusers_unet(image_size, 128, mults, (16,)).state_dict()
    shapes = lambda state: {name: list(value.shape) for name, value in state.items()}
    assert shapes(pretrained.to_diffusers(ours)) == shapes(theirs)
    assert shapes(pretrained.from_diffusers(theirs)) == shapes(pretrained.ours(old_names(theirs))) == shapes(ours)
    found = pretrained.architecture(ours)
    assert found.shapes() == shapes(ours) and len(ours) == tensors
    level = int(math.log2(image_size // 16))
    assert found == (3, False, 128, list(mults), 2, [level])


def test_ema_by_default_and_raw_when_asked(tmp_path, small):
    path = write(small, tmp_path / "there", "ckpt.pth")
    ema, raw = opened(path), opened(path, load_ema=False)
    assert (ema.kind, raw.kind, opened(path, load_ema=True).kind) == ("EMA", "raw", "EMA")
    name = "conv_in.weight"
    assert torch.equal(ema.tensors()[name], small.state_dict()[name])
    assert torch.equal(raw.tensors()[name], small.state_dict()[name] + 1)
    assert ema.sha256() != raw.sha256()  # so that one folder never holds images of both


def test_one_kind_of_weights_is_used_and_said(tmp_path, capsys, small):
    folder = tmp_path / "there"
    path = write(small, folder, "model-790000.ckpt")
    assert opened(path, load_ema=False).kind == "only"
    assert "--load_ema does not apply" in capsys.readouterr().err
    states = ckpt_pth({}, released(small))[:4]  # model.ema: False
    torch.save(states, folder / "ckpt.pth")
    assert opened(folder / "ckpt.pth").kind == "raw"


def test_what_is_assumed_can_be_overridden(tmp_path, capsys, small):
    path = write(small, tmp_path / "there", "model-790000.ckpt")
    assert list(opened(path, data__image_size=64).config.model.attn_resolutions) == [32]
    assert opened(path, model__attn_resolutions=[8]).config.data.image_size == 16
    capsys.readouterr()
    config = opened(path, diffusion__beta_schedule="cosine", model__n_heads=4, diffusion__objective="pred_v").config
    assert (config.diffusion.beta_schedule, config.model.n_heads, config.diffusion.objective) == ("cosine", 4, "pred_v")
    told = capsys.readouterr().err
    assert "norm_groups = 32" in told and "objective" not in told and "n_heads" not in told
    for keys in ({"model__dim": 64}, {"model__dim_mults": [1, 2, 3]}, {"data__channels": 1}):
        with pytest.raises(InputError, match="contradicts the weights"):
            opened(path, **keys)


def test_the_authors_config_beside_their_checkpoint_is_read(tmp_path, capsys, small):
    path = write(small, tmp_path / "there", "ckpt.pth")
    text = """data: !!python/object:argparse.Namespace {dataset: CIFAR10, image_size: 32, channels: 3}
model: !!python/object:argparse.Namespace
  {ch: 32, ch_mult: [1, 2, 2], num_res_blocks: 2, attn_resolutions: [16, 7], dropout: 0.1, var_type: fixedsmall}
diffusion: !!python/object:argparse.Namespace
  {beta_schedule: quad, beta_start: 0.0002, beta_end: 0.03, num_diffusion_timesteps: 500}
"""
    (path.parent / "config.yml").write_text(text)
    config = opened(path).config
    assert (config.diffusion.beta_schedule, config.diffusion.beta_start, config.diffusion.total_steps) == (
        "quad", 0.0002, 500,
    )  # fmt: skip
    assert config.sample.sampler == "fixed-small" and "beta" not in capsys.readouterr().err
    (path.parent / "config.yml").write_text(text.replace("ch: 32", "ch: 64"))
    with pytest.raises(InputError, match=r"model.dim = 32, but the config beside it says 64"):
        opened(path)
    (path.parent / "config.yml").write_text("!!python/object/apply:os.system [echo]")
    with pytest.raises(InputError, match=r"config\.yml can't be read"):
        opened(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: {image_size: '32x'}", "data.image_size = '32x'"),
        ("data: {image_size: 0}", "data.image_size = 0"),
        ("model: {attn_resolutions: 16}", "model.attn_resolutions = 16"),
        ("model: {var_type: [1]}", "config.yml can't be read"),
        ("model: {? [1] : 2}", "config.yml can't be read"),
        ("[" * 5000, "config.yml can't be read"),
        ("data: {dataset: 2001-99-99}", "config.yml can't be read"),
    ],
)
def test_an_odd_config_of_the_authors_is_named(tmp_path, small, text, says):
    path = write(small, tmp_path / "there", "ckpt.pth")
    (path.parent / "config.yml").write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        opened(path)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"variance_type": "fixed_small"}, {"sample.sampler": "fixed-small"}),
        ({"beta_schedule": "scaled_linear"}, {"diffusion.beta_schedule": "quad"}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"diffusion.beta_schedule": "cosine"}),
        ({"beta_schedule": "sigmoid", "num_train_timesteps": 300}, {"diffusion.beta_schedule": "sigmoid"}),
        ({"trained_betas": [0.01] * 50}, {"diffusion.total_steps": 50}),
        ({"trained_betas": torch.linspace(1e-3, 1e-2, 9).tolist()}, {"diffusion.beta_schedule": "linear"}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"diffusion.objective": "pred_v", "diffusion.zero_terminal_snr": True},
        ),
        ({"clip_sample": False, "timestep_spacing": "trailing"}, {"sample.clip_denoised": False}),
    ],
)
def test_a_scheduler_gives_the_schedule_that_it_has(options, keys):
    from diffusions import build_process
    from utils import config
    from utils.diffusers_format import scheduler_json, scheduler_keys

    scheduler = DDPMScheduler(**options)
    found, notes = scheduler_keys(json.loads(scheduler.to_json_string()))
    assert not notes and found.items() >= keys.items()
    merged = config.merge(("their config", found))
    alpha_bar = build_process(merged.diffusion).alpha_bar
    torch.testing.assert_close(alpha_bar.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    for kind in (DDPMScheduler, DDIMScheduler):  # and back: DDIM's knows fewer schedules
        again = kind.from_config(scheduler_json(merged))
        torch.testing.assert_close(again.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=1e-7)
        assert again.config.prediction_type == scheduler.config.prediction_type
        assert again.config.timestep_spacing == scheduler.config.timestep_spacing
        assert again.config.clip_sample == scheduler.config.clip_sample


def test_heads_are_those_of_diffusers(tmp_path):
    """One width is attended: a width per head is a number of heads."""
    config = dict(diffusers_unet(**SMALL).config) | {"attention_head_dim": 16}
    theirs = randomised(UNet2DModel.from_config(config))
    theirs.save_pretrained(tmp_path / "there")
    weights = opened(tmp_path / "there")
    assert weights.config.model.n_heads == 4
    assert_equal_outputs(load_network(weights, "cpu"), theirs, *inputs(32))
