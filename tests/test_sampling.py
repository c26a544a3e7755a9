"""sample_ddpm.py from the command line: folders, modes, restarts, and independence of micro-batch and processes."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import command, environment, run

from utils.images import read_png


def images(folder: Path) -> torch.Tensor:
    return torch.stack([read_png(path) for path in sorted(folder.glob("*.png"))])


def sample(trained: Path, cwd: Path, out: str, *args: object, processes: int = 1, status: int = 0):
    common = ["--weights", trained, "--save_dir", out, *args]
    return run("sample_ddpm.py", *common, cwd=cwd, processes=processes, status=status)


def test_folder_holds_only_samples_and_protocol(tmp_path: Path, trained: Path) -> None:
    done = sample(trained, tmp_path, "out", "--n_samples", 5, "--var_type", "fixed_small", "--skip_steps", 4)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{i:06d}.png" for i in range(5)] + ["protocol.json"]
    assert (tmp_path / "out-grid.png").exists() and "out-grid.png" in done.stdout
    identity = json.loads((tmp_path / "out/protocol.json").read_text())["identity"]
    assert identity["sampler"] == "fixed-small" and identity["seed"] == 2022
    assert identity["timesteps"] == [999, 749, 499, 249]  # trailing, as the recipe of the digits says
    assert images(tmp_path / "out").shape == (5, 1, 8, 8)


def test_sampling_waits_for_no_library_that_it_does_not_need(tmp_path: Path, trained: Path) -> None:
    args = command("sample_ddpm.py", "--weights", trained, "--n_samples", 2, "--save_dir", tmp_path / "out")
    env = environment() | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "torch" in imported
    assert not imported & {"torchvision", "torch_fidelity", "torch._dynamo", "sklearn", "matplotlib"}


def test_images_do_not_depend_on_micro_batch_or_processes(tmp_path: Path, trained: Path) -> None:
    args = ["--n_samples", 64, "--skip_steps", 20, "--sampler", "fixed-large", "--sample.mixed_precision", "no"]
    sample(trained, tmp_path, "one", *args, "--micro_batch", 64)
    sample(trained, tmp_path, "two", *args, "--micro_batch", 7, processes=2)
    one, two = images(tmp_path / "one").int(), images(tmp_path / "two").int()
    assert one.shape == two.shape == (64, 1, 8, 8)
    assert (one - two).abs().max() <= 1
    assert (one != two).float().mean() <= 1e-3
    assert len({image.numpy().tobytes() for image in two}) == 64  # ranks do not draw the same noise


def test_interrupted_generation_continues_to_the_same_set(tmp_path: Path, trained: Path) -> None:
    args = ["--skip_steps", 3, "--sampler", "fixed-large", "--sample.mixed_precision", "no"]
    sample(trained, tmp_path, "whole", "--n_samples", 12, *args)
    sample(trained, tmp_path, "parts", "--n_samples", 7, *args)
    (tmp_path / "parts/000003.png").unlink()
    (tmp_path / "parts/.000004.png.tmp").write_bytes(b"half")
    done = sample(trained, tmp_path, "parts", "--n_samples", 12, *args)
    assert "6 of 12 images to make" in done.stderr
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert torch.equal(images(tmp_path / "whole"), images(tmp_path / "parts"))


@pytest.mark.parametrize("mode", ["denoise", "progressive"])
def test_strips_end_in_the_sample(tmp_path: Path, trained: Path, mode: str) -> None:
    common = ["--n_samples", 3, "--sampler", "ddim", "--skip_steps", 6, "--sample.mixed_precision", "no"]
    sample(trained, tmp_path, "images", *common)
    sample(trained, tmp_path, "strips", *common, "--mode", mode, f"--n_{mode}", 4, processes=2)
    strips = images(tmp_path / "strips")
    assert strips.shape == (3, 1, 8, 4 * 8)
    assert (strips[..., -8:].int() - images(tmp_path / "images").int()).abs().max() <= 1
    assert not torch.equal(strips[..., :8], strips[..., -8:])
    sample(trained, tmp_path, "default", *common, "--mode", mode)
    assert images(tmp_path / "default").shape == (3, 1, 8, 6 * 8)  # min(20, S) frames


def test_load_ema_chooses_the_weights(tmp_path: Path, trained: Path) -> None:
    for name, value in (("ema", "true"), ("raw", "False"), ("default", None)):
        args = [] if value is None else ["--load_ema", value]
        sample(trained, tmp_path, name, "--n_samples", 2, "--skip_steps", 3, *args)
    assert torch.equal(images(tmp_path / "ema"), images(tmp_path / "default"))
    assert not torch.equal(images(tmp_path / "ema"), images(tmp_path / "raw"))
    ema = trained / "ckpt/step000012/ema.safetensors"
    sample(ema, tmp_path, "file", "--n_samples", 2, "--skip_steps", 3)
    assert torch.equal(images(tmp_path / "ema"), images(tmp_path / "file"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--eta", "0.5", "--sampler", "fixed-small"], ["eta", "fixed-small"]),
        (["--eta", "1.5"], ["eta", "<= 1"]),
        (["--sampler", "fixed-smal"], ["fixed-smal", "did you mean fixed-small"]),
        (["--skip_steps", "1001"], ["skip_steps", "1 to 1000"]),
        (["--skip_steps", "0"], ["skip_steps", ">= 1"]),
        (["--eta", "0", "--sample.eta", "0"], ["--eta", "--sample.eta"]),
        (["--mode", "denoise", "--skip_steps", "5", "--n_denoise", "6"], ["--n_denoise 6", "5 sampling steps"]),
        (["--n_progressive", "3"], ["--n_progressive", "progressive"]),
        (["--mode", "dream"], ["dream", "progressive"]),
        (["--load_ema", "perhaps"], ["perhaps"]),
        (["--model.dim", "64"], ["model.dim", "contradicts"]),
        (["--diffusion.total_steps", "100"], ["diffusion.total_steps", "contradicts"]),
        (["--micro_batch", "0"], ["micro_batch"]),
        (["--sample.mixed_precision", "fp16"], ["fp16", "GPU"]),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, trained: Path, args: list[str], words: list[str]) -> None:
    done = sample(trained, tmp_path, "out", "--n_samples", 2, *args, status=2)
    assert len(done.stderr.strip().splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(tmp_path: Path, trained: Path) -> None:
    sample(trained, tmp_path, "out", "--n_samples", 1, "--skip_steps", 2)
    done = sample(trained, tmp_path, "out", "--n_samples", 1, "--skip_steps", 3, status=2)
    assert "another protocol" in done.stderr and "timesteps" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    assert "thesis.tex" in sample(trained, tmp_path, "mine", "--n_samples", 1, status=2).stderr


@pytest.mark.parametrize("damage", ["truncated", "other architecture", "missing", "text"])
def test_bad_weights_are_named(tmp_path: Path, trained: Path, damage: str) -> None:
    subprocess.run(["cp", "-r", trained / "ckpt/step000012", tmp_path / "w"], check=True)
    if damage == "truncated":
        file = tmp_path / "w/ema.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        words, path = ["ema.safetensors is damaged"], tmp_path / "w"
    elif damage == "missing":
        words, path = ["no such file"], tmp_path / "nothing"
    elif damage == "text":
        (tmp_path / "alone.safetensors").write_text("hello")
        (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
        words, path = ["alone.safetensors can't be read"], tmp_path / "alone.safetensors"
    else:
        (tmp_path / "x").mkdir()
        (tmp_path / "w/ema.safetensors").rename(tmp_path / "x/net.safetensors")
        text = (trained / "config.yaml").read_text().replace("dim: 8", "dim: 16")
        (tmp_path / "x/config.yaml").write_text(text)
        words, path = (
            ["another architecture", "model.dim = 8", "model.dim", "beside it 16"],
            tmp_path / "x/net.safetensors",
        )
    done = sample(path, tmp_path, "out", "--n_samples", 1, status=2)
    assert len(done.stderr.strip().splitlines()) <= 2 and all(word in done.stderr for word in words), done.stderr
