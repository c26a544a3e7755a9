"""convert_ddpm.py: every format out and back bit for bit, diffusers' pipelines against our images, and wrong input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from in_process import call, contents, random_weights, refused
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_pretrained import SMALL, ckpt_pth, released
from test_unet import diffusers_unet, randomised

import convert_ddpm
import sample_ddpm
from diffusions.noise import randn
from utils import checkpoint, config, export, foreign, hub
from utils.errors import InputError
from utils.images import read_png
from utils.weights import open_weights

AS_THEIRS = {"model__norm_groups": 32, "model__dim": 32, "diffusion__beta_schedule": "quad", "data__channels": 3}
AS_THEIRS |= {"diffusion__objective": "pred_eps", "data__image_size": 32, "model__attn_resolutions": [16]}


def convert(cwd: Path, weights: Path, to: str, out: str = "out", *args: object):
    return call(convert_ddpm.main, "--weights", weights, "--to", to, "--out", out, *args, cwd=cwd)


def opened(path: Path, load_ema: bool | None = None):
    return open_weights(str(path), load_ema, [("test", {})])


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- out and back ---


@pytest.mark.parametrize("to", convert_ddpm.FORMATS)
def test_every_format_comes_back_bit_for_bit(tmp_path: Path, to: str) -> None:
    file = random_weights(tmp_path / "ours", **AS_THEIRS, model__num_res_blocks=2)
    convert(tmp_path, file, to)
    place = {"ddim": tmp_path / "out/ckpt.pth", "safetensors": tmp_path / "out/weights.safetensors"}
    found = opened(place.get(to, tmp_path / "out"))
    assert same(found.tensors(), load_file(file))
    stored = opened(file).config
    wanted = ("model", "diffusion") if to != "ddim" else ("model",)
    for section in wanted:
        assert found.config[section] == stored[section]
    assert found.config.diffusion.beta_schedule == "quad" and found.config.diffusion.total_steps == 20
    assert (found.config.data.image_size, found.config.data.channels) == (32, 3)
    call(
        convert_ddpm.main,
        "--weights",
        place.get(to, tmp_path / "out"),
        "--to",
        "safetensors",
        "--out",
        "again",
        cwd=tmp_path,
    )
    (again,) = (tmp_path / "again").glob("*.safetensors")
    assert same(load_file(again), load_file(file))


def test_ema_by_default_raw_when_asked_and_both_where_there_is_room(tmp_path: Path, trained: Path) -> None:
    step = trained / "ckpt/step000012"
    raw, ema = load_file(step / "model.safetensors"), load_file(step / "ema.safetensors")
    assert not same(raw, ema)
    convert(tmp_path, trained, "safetensors", "a")
    convert(tmp_path, trained, "safetensors", "b", "--load_ema", "false")
    assert same(load_file(tmp_path / "a/ema.safetensors"), ema) and same(
        load_file(tmp_path / "b/model.safetensors"), raw
    )
    assert opened(tmp_path / "a/ema.safetensors").kind == "EMA"
    with pytest.raises(InputError, match="names the EMA weights"):
        opened(tmp_path / "a/ema.safetensors", load_ema=False)
    convert(tmp_path, trained, "native", "c")
    published = tmp_path / "c/ckpt/step000000"
    assert checkpoint.problem(published) is None
    assert same(load_file(published / "model.safetensors"), raw) and same(load_file(published / "ema.safetensors"), ema)
    convert(tmp_path, trained, "native", "d", "--load_ema", "false")
    assert same(load_file(tmp_path / "d/ckpt/step000000/ema.safetensors"), raw)


def test_the_ddim_authors_checkpoint_has_their_form(tmp_path: Path) -> None:
    """What their sampling code does with it: strict names with `module.`, then the EMA over them."""
    file = random_weights(tmp_path / "ours", **AS_THEIRS, model__num_res_blocks=2)
    convert(tmp_path, file, "ddim")
    states = torch.load(tmp_path / "out/ckpt.pth", weights_only=True)
    assert [type(entry) for entry in states] == [dict, dict, int, int, dict]
    assert same(states[4], {name.removeprefix("module."): value for name, value in states[0].items()})
    assert all(name.startswith("module.") for name in states[0])
    parameters = [torch.nn.Parameter(value) for value in states[4].values()]
    torch.optim.Adam(parameters, lr=1e-3).load_state_dict(states[1])  # so that their training can start from it
    theirs = OmegaConf.load(tmp_path / "out/config.yml")
    assert list(theirs.model.ch_mult) == [1, 2] and theirs.diffusion.num_diffusion_timesteps == 20
    assert list(theirs.model.attn_resolutions) == [16] and theirs.data.image_size == 32


def test_a_file_alone_says_what_it_is(tmp_path: Path, trained: Path) -> None:
    convert(tmp_path, trained, "safetensors")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "out/ema.safetensors", tmp_path / "elsewhere/mine.safetensors")
    args = ["--n_samples", 2, "--skip_steps", 2, "--sample.mixed_precision", "no"]
    done = call(sample_ddpm.main, "--weights", "elsewhere/mine.safetensors", "--save_dir", "one", *args, cwd=tmp_path)
    assert "mine.safetensors (EMA weights)" in done.stderr
    call(sample_ddpm.main, "--weights", trained, "--save_dir", "two", *args, cwd=tmp_path)
    pixels = [[(tmp_path / name / f"00000{i}.png").read_bytes() for i in range(2)] for name in ("one", "two")]
    assert pixels[0] == pixels[1]


def test_a_checkpoints_file_that_was_taken_away_still_says_what_it_is(tmp_path: Path, trained: Path) -> None:
    for name, kind in (("ema", "EMA"), ("model", "raw")):
        source = next(trained.glob(f"ckpt/step000012/{name}.safetensors"))
        alone = shutil.copy(source, tmp_path / f"my-{name}.safetensors")
        found, beside = opened(alone), opened(trained, load_ema=kind == "EMA")
        assert found.kind == kind and found.config == beside.config


def test_training_goes_on_from_what_was_converted(tmp_path: Path) -> None:
    """A converted run starts at its weights, with a new optimizer, as its -c and data keys say."""
    network = randomised(diffusers_unet(8, 32, (1, 2), (4,)))
    network.save_pretrained(tmp_path / "theirs")
    keys = ["--data.name", "digits", "--data.valid_fraction", 0.9, "--train.n_steps", 2, "--train.batch_size", 8]
    keys += ["--train.n_valid", 8, "--train.n_samples", 1, "--sample.skip_steps", 2, "--train.ema_decay", 0.5]
    done = convert(tmp_path, tmp_path / "theirs", "native", "run", *keys, "--train.lr", 1e-9)
    assert "step 0" in done.stdout and "digits" in done.stdout
    run("train_ddpm.py", "-e", "run", "-r", "auto", cwd=tmp_path)
    before, after = (load_file(tmp_path / f"run/ckpt/step00000{i}/ema.safetensors") for i in (0, 2))
    assert not same(before, after)
    assert all((before[name] - after[name]).abs().max() <= 1e-7 for name in before)


# --- diffusers samples what we export ---


def feed(patch: pytest.MonkeyPatch, seed: int, n: int, shape: tuple[int, ...]) -> None:
    """diffusers draws the noise that image 0..n-1 of `seed` have here."""
    draws = iter(range(10_000))
    drawn = lambda *args, **kwargs: randn(seed, torch.arange(n), next(draws), shape, torch.device("cpu"))
    for place in ("pipelines.ddim.pipeline_ddim", "pipelines.ddpm.pipeline_ddpm"):
        patch.setattr(f"diffusers.{place}.randn_tensor", drawn)
    for place in ("schedulers.scheduling_ddpm", "schedulers.scheduling_ddim"):
        patch.setattr(f"diffusers.{place}.randn_tensor", drawn)


CLIPPED = {"use_clipped_model_output": True}
LEARNED = {"sample__sampler": "learned-range", "diffusion__learn_variance": True}
UNIFORM = {"sample__skip_type": "uniform"}
SAMPLED = [  # our keys, the pipeline, its arguments
    ({}, DDIMPipeline, CLIPPED),
    ({"sample__eta": 1.0}, DDIMPipeline, {**CLIPPED, "eta": 1.0}),
    ({"sample__clip_denoised": False}, DDIMPipeline, {}),
    ({**UNIFORM, "diffusion__beta_schedule": "sigmoid"}, DDIMPipeline, CLIPPED),
    ({"diffusion__zero_terminal_snr": True}, DDIMPipeline, CLIPPED),
    ({"sample__sampler": "fixed-small"}, DDPMPipeline, {}),
    ({"sample__sampler": "fixed-small", "diffusion__objective": "pred_x0"}, DDPMPipeline, {}),
    ({"sample__sampler": "fixed-large", **UNIFORM, "diffusion__beta_schedule": "const"}, DDPMPipeline, {}),
    ({"sample__sampler": "fixed-large", **UNIFORM, "diffusion__objective": "pred_eps"}, DDPMPipeline, {}),
    ({**LEARNED, **UNIFORM}, DDPMPipeline, {}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "pipeline", "arguments"), SAMPLED)
@pytest.mark.parametrize("steps", [5, 20])
def test_diffusers_makes_our_images(tmp_path, monkeypatch, keys, pipeline, arguments, steps) -> None:
    keys = {"diffusion__total_steps": 20, "diffusion__beta_end": 0.5, "diffusion__beta_schedule": "linear"} | keys
    keys |= {"data__channels": 3}  # so that pictures are not compared by one channel alone
    file = random_weights(tmp_path / "ours", **keys)
    convert(tmp_path, file, "diffusers")
    names = ["README.md", "model_index.json", "scheduler", "unet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    args = ["--n_samples", 4, "--save_dir", "images", "--skip_steps", steps, "--micro_batch", 4]
    call(sample_ddpm.main, "--weights", file, *args, cwd=tmp_path)
    ours = torch.stack([read_png(path) for path in sorted((tmp_path / "images").glob("*.png"))])
    made = pipeline.from_pretrained(tmp_path / "out")
    made.set_progress_bar_config(disable=True)
    feed(monkeypatch, 2022, 4, (3, 8, 8))
    theirs = made(batch_size=4, num_inference_steps=steps, output_type="np", **arguments).images
    theirs = torch.from_numpy(np.round(theirs * 255)).permute(0, 3, 1, 2)
    assert ours.float().std() > 20  # a picture, not a plain one
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 0.02


def test_the_model_card_says_how_to_get_our_images(tmp_path: Path) -> None:
    file = random_weights(tmp_path / "ours", sample__skip_steps=7)
    convert(tmp_path, file, "diffusers")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "num_inference_steps=7, use_clipped_model_output=True" in card and "T = 20, cosine betas" in card
    parameters = sum(value.numel() for value in load_file(file).values())
    assert f"{parameters:,} parameters" in card and str(tmp_path) not in card
    unet = UNet2DModel.from_pretrained(tmp_path / "out/unet")
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


# --- refused ---


@pytest.mark.parametrize(
    ("to", "keys", "says"),
    [
        ("diffusers", {"model__dim_mults": [2, 4]}, ["model.dim_mults[0] = 2"]),
        ("diffusers", {"model__n_heads": 2}, ["model.n_heads = 2", "[8, 16]"]),
        ("ddim", {}, ["model.norm_groups = 4", "diffusion.beta_schedule = cosine", "diffusion.objective = pred_v"]),
        ("ddim", {"diffusion__learn_variance": True}, ["diffusion.learn_variance = True"]),
    ],
)
def test_what_a_format_can_not_hold_is_named(tmp_path: Path, to: str, keys: dict, says: list[str]) -> None:
    file = random_weights(tmp_path / "ours", **{"model__attn_resolutions": [8, 4], **keys})
    refused(convert_ddpm.main, "--weights", file, "--to", to, "--out", "out", cwd=tmp_path, says=says)


def test_heads_at_one_width_are_exported(tmp_path: Path) -> None:
    file = random_weights(tmp_path / "ours", model__n_heads=2)
    convert(tmp_path, file, "diffusers")
    assert opened(tmp_path / "out").config.model.n_heads == 2


def test_options_that_only_concern_sampling_are_told(tmp_path: Path) -> None:
    diffusers_unet(**SMALL).save_pretrained(tmp_path / "there/unet")
    (tmp_path / "there/scheduler").mkdir()
    options = {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False}
    (tmp_path / "there/scheduler/scheduler_config.json").write_text(json.dumps(options))
    done = call(convert_ddpm.main, "--weights", "there", "--print_config", cwd=tmp_path)
    assert "steps_offset = 1" in done.stderr and "set_alpha_to_one = False" in done.stderr
    assert "sampler: ddim" in done.stdout and "image_size: 32" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--to", "onnx"], ["--to", "onnx", "safetensors"]),
        (["--to", "native"], ["--weights", "--out"]),
        (["--weights", "absent", "--to", "native", "--out", "out"], ["absent", "no such"]),
        (["--weights", "full/notes.txt", "--to", "native", "--out", "out"], ["notes.txt", ".ckpt"]),
        (["--weights", "full", "--to", "native", "--out", "out"], ["full", "neither"]),
        (["--weights", "ours/net.safetensors", "--to", "native", "--out", "full"], ["--out full", "already holds"]),
        (["--weights", "ours/net.safetensors", "--to", "native", "--out", "full/notes.txt"], ["is a file"]),
        (["--weights", "ours/net.safetensors", "--to", "native", "--out", "o", "--model.dim", "16"], ["contradicts"]),
        (["--weights", "latent", "--to", "native", "--out", "out"], ["LDMPipeline", "vqvae"]),
        (["--weights", "shards", "--to", "native", "--out", "out"], ["several shards"]),
        (["--weights", "nothing", "--to", "native", "--out", "out"], ["diffusion_pytorch_model.safetensors"]),
        (["--weights", "broken", "--to", "native", "--out", "out"], ["model_index.json", "can't be read"]),
    ],
)
def test_wrong_input_ends_in_one_line_and_changes_nothing(tmp_path: Path, args: list[str], says: list[str]) -> None:
    random_weights(tmp_path / "ours")
    for name, text in {
        "full/notes.txt": "mine",
        "latent/model_index.json": '{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}',
        "shards/unet/diffusion_pytorch_model.safetensors.index.json": "{}",
        "nothing/config.json": "{}",
        "broken/model_index.json": "{",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    refused(convert_ddpm.main, *args, cwd=tmp_path, says=says)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = random_weights(tmp_path / "ours")
    before = contents(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    for to in convert_ddpm.FORMATS[:2]:
        with monkeypatch.context() as patch:
            patch.setattr(export, "_save", full)
            patch.setattr(checkpoint, "save_file", full)
            done = call(convert_ddpm.main, "--weights", file, "--to", to, "--out", "o", cwd=tmp_path, status=1)
        assert "No space left" in done.stderr and contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(tmp_path, random_weights(tmp_path / "ours"), "safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "weights.safetensors"]


# --- the hub ---


def test_ids_of_the_hub_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.is_id("google/ddpm-cifar10-32") and hub.is_id("me/my_model.v2")
    for path in ("here/model", "runs/demo", "model", "a/b/c", "/a/b", "./a/b", "../a", "a/"):
        assert not hub.is_id(path), path


def test_a_hub_model_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, asked = randomised(diffusers_unet(**SMALL)), []
    network.save_pretrained(tmp_path / "cache")

    def download(model_id, allow_patterns):
        asked.append((model_id, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert(tmp_path, Path("someone/ddpm"), "safetensors")
    assert asked == [("someone/ddpm", ["*.json", "*.safetensors"])]
    weights = open_weights("someone/ddpm", None, [])
    assert weights.describe().startswith("someone/ddpm/") and weights.scores == Path("scores/someone--ddpm")


def test_without_network_or_package_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand more")

    args = ["--weights", "someone/ddpm", "--to", "native", "--out", "out"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(convert_ddpm.main, *args, cwd=tmp_path, says=["someone/ddpm", "no such", "hub", "Name or service"])
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    refused(convert_ddpm.main, *args, cwd=tmp_path, says=["someone/ddpm", "pip install huggingface_hub"])


# --- the script ---


def test_the_script_is_short_and_its_formats_are_those_that_can_be_written() -> None:
    assert len((ROOT / "convert_ddpm.py").read_text().splitlines()) < 150
    assert tuple(export.FORMATS) == convert_ddpm.FORMATS
    assert set(foreign.ASSUMED) <= set(config.KEYS)


def test_both_kinds_of_the_ddim_authors_survive(tmp_path: Path) -> None:
    small = released(randomised(diffusers_unet(**SMALL)))
    torch.save(ckpt_pth(small, {name: value + 1 for name, value in small.items()}), tmp_path / "ckpt.pth")
    convert(tmp_path, tmp_path / "ckpt.pth", "native", "run")
    convert(tmp_path, tmp_path / "run", "ddim", "back")
    states = torch.load(tmp_path / "back/ckpt.pth", weights_only=True)
    assert same(states[4], small)
    assert same(states[0], {f"module.{name}": value + 1 for name, value in small.items()})
