"""Foreign weights that can't be read: each is described in one line, and no pickle is executed."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from in_process import call, refused
from safetensors.torch import save_file
from test_pretrained import SMALL, released
from test_unet import diffusers_unet, randomised

import convert_ddpm
import sample_ddpm


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    return released(randomised(diffusers_unet(**SMALL)))


def lacks(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


UNREADABLE = {  # name -> (what torch.save gets, what the line says)
    "a list of another kind": (lambda s: [s, s], ["list of 2", "DDIM authors"]),
    "nested": (lambda s: {"epoch": 3, "state_dict": s}, ["dict of epoch, state_dict", "plain state dict"]),
    "a number": (lambda s: 5, ["int", "plain state dict"]),
    "nothing": (lambda s: {}, ["unknown layout"]),
    "a lost tensor": (lambda s: lacks(s, "mid.attn_1.q.bias"), ["almost", "1 tensors missing (mid.attn_1.q.bias)"]),
    "one more": (lambda s: s | {"up.0.x": torch.zeros(1)}, ["almost", "1 tensors not in the network (up.0.x)"]),
    "a shape": (
        lambda s: s | {"norm_out.bias": torch.zeros(7)},
        ["almost", "norm_out.bias: [7], wanted [32]"],
    ),
    "no stem": (lambda s: lacks(s, "conv_in.weight"), ["almost", "conv_in.weight"]),
    "adaptive group norm": (
        lambda s: (
            s | {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in s.items() if "temb_p" in name}
        ),
        ["adaptive group normalisation"],
    ),
    "classes": (lambda s: s | {"class_embedding.weight": torch.zeros(10, 128)}, ["class embeddings"]),
    "guided diffusion": (lambda s: {"input_blocks.0.0.weight": torch.zeros(1)}, ["guided-diffusion"]),
    "another package": (lambda s: {"ema_model.init_conv.weight": torch.zeros(1)}, ["denoising-diffusion-pytorch"]),
    "unknown names": (lambda s: {"net.0.weight": torch.zeros(1)}, ["net.0.weight", "no layout"]),
    "output": (lambda s: s | {"conv_out.weight": torch.zeros(5, 32, 3, 3)}, ["5 output channels"]),
    "not finite": (lambda s: s | {"norm_out.bias": torch.full((32,), torch.nan)}, ["not finite (norm_out.bias)"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_are_no_such_network_are_described(tmp_path: Path, small: dict, name: str) -> None:
    make, says = UNREADABLE[name]
    torch.save(make(small), tmp_path / "model.pth")
    arguments = ["--to", "native", "--out", "out", "--data.image_size", 32]
    done = call(convert_ddpm.main, "--weights", "model.pth", *arguments, cwd=tmp_path, status=2)
    error = done.stderr.splitlines()[-1]
    assert done.stdout == "" and error.startswith("convert_ddpm.py: error: ") and "model.pth" in error
    assert all(part in error for part in says), error
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("half", ["read"]),
        (b"", ["is empty"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", ["web page"]),
        (b"hello", ["can't be read"]),
    ],
)
def test_damaged_files_are_told_apart(tmp_path: Path, small: dict, suffix: str, content, says: list[str]) -> None:
    file = tmp_path / f"model{suffix}"
    if content == "half":
        torch.save(small, file) if suffix == ".pth" else save_file(small, file)
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content)
    refused(
        convert_ddpm.main, "--weights", file, "--to", "native", "--out", "out", cwd=tmp_path, says=[*says, file.name]
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_executed(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    torch.save({"conv_in.weight": Payload(marker)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    if not zipped:
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Payload(marker)))
    says = ["a.ckpt", "pickle", "refused", "nothing of it was executed", "calls io.open" if zipped else "more than"]
    refused(convert_ddpm.main, "--weights", "a.ckpt", "--to", "native", "--out", "out", cwd=tmp_path, says=says)
    refused(sample_ddpm.main, "--weights", "a.ckpt", "--n_samples", 1, "--save_dir", "out", cwd=tmp_path, says=says)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, ["resnet_time_scale_shift = scale_shift", "adaptive group"]),
        ({"num_class_embeds": 10}, ["num_class_embeds = 10", "class embeddings"]),
        ({"downsample_padding": 1, "norm_eps": 1e-5}, ["downsample_padding = 1, wanted 0", "norm_eps = 1e-05"]),
        ({"flip_sin_to_cos": None}, ["flip_sin_to_cos = True, wanted False (the default of diffusers"]),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 3}, ["ResnetDownsampleBlock2D"]),
        ({"attention_head_dim": 8, "down_block_types": ["AttnDownBlock2D"] * 3,
          "up_block_types": ["AttnUpBlock2D"] * 3}, ["attention_head_dim = 8", "heads"]),
        ({"something_new": 3}, ["something_new = 3"]),
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel"]),
        ({"sample_size": [32, 64]}, ["not square"]),
        ({"block_out_channels": [64, 64, 64]}, ["model.dim = 32", "says 64"]),
        ({"block_out_channels": 5}, ["config.json", "wrong type"]),
        ({"layers_per_block": 3}, ["num_res_blocks"]),
        ({"sample_size": 0}, ["data.image_size = 0", "wanted int"]),
        ({"sample_size": 32.5}, ["data.image_size = 32.5", "wanted int"]),
        ({"sample_size": "big"}, ["data.image_size = 'big'", "wanted int"]),
    ],
)  # fmt: skip
def test_options_of_diffusers_that_are_not_here_are_named(tmp_path, small, options, says) -> None:
    network = diffusers_unet(**SMALL)
    network.save_pretrained(tmp_path / "there")
    path = tmp_path / "there/config.json"
    found = json.loads(path.read_text()) | options
    path.write_text(json.dumps({name: value for name, value in found.items() if options.get(name, 0) is not None}))
    refused(convert_ddpm.main, "--weights", "there", "--to", "native", "--out", "out", cwd=tmp_path, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, ["ScoreSdeVeScheduler", "DDPMScheduler"]),
        ({"variance_type": "learned"}, ["variance_type = learned"]),
        ({"prediction_type": "flow"}, ["prediction_type = flow"]),
        ({"beta_schedule": "laplace"}, ["beta_schedule = laplace"]),
        ({"trained_betas": [0.1, 0.3, 0.05]}, ["trained_betas, 3 from 0.1 to 0.05"]),
    ],
)
def test_schedulers_that_are_not_here_are_named(tmp_path: Path, options: dict, says: list[str]) -> None:
    diffusers_unet(**SMALL).save_pretrained(tmp_path / "there/unet")
    (tmp_path / "there/scheduler").mkdir()
    (tmp_path / "there/scheduler/scheduler_config.json").write_text(json.dumps(options))
    refused(convert_ddpm.main, "--weights", "there", "--to", "native", "--out", "out", cwd=tmp_path, says=says)
