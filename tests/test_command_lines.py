"""The five scripts as processes: help, --print_config, and wrong input that ends in one line with status 2."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, command
from omegaconf import OmegaConf

from utils import config

HEAVY = {"torch", "torchvision", "accelerate", "torch_fidelity", "matplotlib", "sklearn"}
LAUNCHER = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_", "WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "CUDA_VISIBLE_DEVICES")

SCRIPTS = {  # name -> sections whose keys its help lists, its own options
    "train_ddpm.py": ("seed data model diffusion train sample evaluate", "-c -e -r --print_config"),
    "sample_ddpm.py": (
        "data model diffusion train sample evaluate",
        "-c --weights --n_samples --save_dir --seed --load_ema --sampler --var_type --skip_type --skip_steps --eta "
        "--micro_batch --mode --n_denoise --n_progressive --print_config",
    ),
    "evaluate_ddpm.py": (
        "data model diffusion train sample evaluate",
        "-c --weights --images --reference --n_samples --metrics --samplers --skip_steps --feature_extractor "
        "--feature_extractor_weights --out --force --print_config",
    ),
    "convert_ddpm.py": (
        "data model diffusion train sample evaluate",
        "-c --weights --to --out --load_ema --print_config",
    ),
    "explore_ddpm.py": (
        "data model diffusion train sample evaluate",
        "-c --weights --load_ema --host --port --save_dir --print_config",
    ),
}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a machine without a GPU and without a launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", **extra}


def run(script: str, *args: object, cwd: Path, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *args), cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=120
    )


def assert_refused(script: str, done: subprocess.CompletedProcess, says: list[str]) -> None:
    """Status 2 and one line on stderr that says what it must."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: ") and done.stderr.count("\n") == 1, done.stderr
    missing = [part for part in says if part not in done.stderr]
    assert not missing, f"{done.stderr!r} does not say {missing}"


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """An empty folder to run in; inputs lie beside it."""
    (tmp_path / "cwd").mkdir()
    return tmp_path / "cwd"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_complete_and_quick(cwd: Path, script: str) -> None:
    began = time.monotonic()
    done = run(script, "--help", cwd=cwd, PYTHONPROFILEIMPORTTIME="1")
    assert time.monotonic() - began < 2
    assert done.returncode == 0 and not any(cwd.iterdir())
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"omegaconf", "utils"} <= imported and not imported & HEAVY
    sections, options = (text.split() for text in SCRIPTS[script])
    words = set(done.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert set(options) <= words
    lines = done.stdout.splitlines()
    for name, info in config.KEYS.items():
        if name.partition(".")[0] not in sections:
            assert f"  --{name}" not in lines or name == "seed"
            continue
        doc, kind = lines[lines.index(f"  --{name}") + 1 :][:2]
        assert info.doc == doc.strip()
        assert info.type_name in kind and all(choice in kind for choice in info.choices)
        assert f"(default: {'null' if info.default is None else info.default})" in kind


@pytest.mark.parametrize("script", SCRIPTS)
def test_print_config_can_be_read_back(tmp_path: Path, cwd: Path, script: str) -> None:
    values = {
        "model.dim_mults": [1, 3],
        "sample.eta": -0.0,
        "train.clip_grad_norm": None,
        "train.mixed_precision": "no",
    }
    values |= {
        "sample.sampler": "fixed-small",
        "data.root": "a b: #c",
        "model.attn_resolutions": [],
        "sample.skip_steps": 9,
    }
    args = [f"--{name}={'null' if value is None else value}" for name, value in values.items()]
    first = run(script, "--print_config", *args, cwd=cwd)
    assert first.returncode == 0 and first.stderr == ""
    (tmp_path / "printed.yaml").write_text(first.stdout)
    merged = config.merge(("printed", config.read_yaml(tmp_path / "printed.yaml")))
    assert {name: OmegaConf.select(merged, name) for name in values} == values
    second = run(script, "-c", tmp_path / "printed.yaml", "--print_config", cwd=cwd)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert not any(cwd.iterdir())


# (script, arguments, what the line must say); {inputs} is the folder that `inputs` fills
REFUSED = [
    ("train_ddpm.py", "--train.lrr 1", ["train.lrr", "did you mean train.lr?"]),
    ("train_ddpm.py", "--lr 1", ["--lr", "did you mean --train.lr?"]),
    ("train_ddpm.py", "--rr 1", ["unknown option --rr (--help"]),  # there is no --r to suggest
    ("train_ddpm.py", "--train.lr abc", ["train.lr = 'abc'", "float"]),
    ("train_ddpm.py", "--train.lr", ["--train.lr", "value"]),
    ("train_ddpm.py", "-c", ["-c", "argument"]),
    ("train_ddpm.py", "-c absent.yaml", ["absent.yaml", "does not exist"]),
    ("train_ddpm.py", "-c {inputs}/list.yaml", ["list.yaml", "list"]),
    ("train_ddpm.py", "--model.dim_mults [1,2,${oc.env:HOME}]", ["model.dim_mults", "${oc.env:HOME}"]),
    ("train_ddpm.py", "--data.image_size 9", ["data.image_size = 9", "multiple of 4"]),
    ("sample_ddpm.py", "--n_samples 1 --save_dir out", ["--weights must be given"]),
    ("sample_ddpm.py", "--sampler plms", ["sample.sampler = 'plms'", "fixed-large, fixed-small, learned-range, ddim"]),
    ("sample_ddpm.py", "--eta 0.5 --sample.eta 0.5", ["--eta", "--sample.eta"]),
    ("sample_ddpm.py", "--load_ema perhaps", ["--load_ema", "perhaps"]),
    ("sample_ddpm.py", "--n_samples 0", ["--n_samples", "'0'"]),
    ("sample_ddpm.py", "--seed 1.5", ["--seed", "'1.5'"]),
    ("sample_ddpm.py", "--mode stripes", ["--mode", "stripes", "progressive"]),
    ("evaluate_ddpm.py", "--reference digits", ["--weights", "--images"]),
    ("evaluate_ddpm.py", "--images out", ["--reference"]),
    ("evaluate_ddpm.py", "--images out --reference digits --samplers ddim", ["--samplers", "--weights"]),
    ("evaluate_ddpm.py", "--weights x --reference digits --skip_steps 5 many", ["sample.skip_steps = 'many'"]),
    ("evaluate_ddpm.py", "--weights absent --reference digits --skip_steps null", ["absent"]),
    ("evaluate_ddpm.py", "--metrics fid lpips", ["evaluate.metrics", "lpips", "fid, isc, kid, prc"]),
    ("convert_ddpm.py", "--weights x --out out", ["--to must be given"]),
    ("convert_ddpm.py", "--to onnx", ["--to", "onnx", "native"]),
    # from here on the answer takes torch
    ("convert_ddpm.py", "--weights absent --to native --out out", ["absent", "no such"]),
    ("convert_ddpm.py", "--weights {inputs}/run --to native --out {inputs}/images", ["--out", "already holds"]),
    ("train_ddpm.py", "-e {inputs}/run", ["run", "already holds", "-r auto"]),
    ("train_ddpm.py", "-r auto", ["-r auto", "-e"]),
    ("train_ddpm.py", "-r absent", ["-r absent", "no such"]),
    ("train_ddpm.py", "--train.mixed_precision fp16", ["fp16", "GPU"]),
    ("train_ddpm.py", "--data.name image_folder --data.root {inputs}/run", ["run", "holds no png"]),
    (
        "train_ddpm.py",
        "--data.name image_folder --data.root {inputs}/images --data.valid_fraction 0 --data.num_workers 0",
        ["images/broken.png", "can't be read"],
    ),
    ("sample_ddpm.py", "--weights absent --n_samples 1 --save_dir out", ["--weights absent", "no such"]),
    (
        "sample_ddpm.py",
        "--weights {inputs}/weights.safetensors --n_samples 1 --save_dir out --mode denoise --n_denoise 51",
        ["--n_denoise 51", "50 sampling steps"],
    ),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "list.yaml").write_text("- data\n- model\n")
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("not yours")
    (folder / "images").mkdir()
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(64)))
    (folder / "weights.safetensors").touch()
    (folder / "config.yaml").write_bytes((ROOT / "configs" / "ddpm_digits.yaml").read_bytes())
    return folder


@pytest.mark.parametrize("script, line, says", REFUSED, ids=[f"{script} {line}" for script, line, _ in REFUSED])
def test_wrong_input_ends_in_one_line(cwd: Path, inputs: Path, script: str, line: str, says: list[str]) -> None:
    before = sorted(inputs.rglob("*"))
    done = run(script, *line.replace("{inputs}", str(inputs)).split(), cwd=cwd)
    assert_refused(script, done, says)
    assert sorted(inputs.rglob("*")) == before
    assert [str(path.relative_to(cwd)) for path in cwd.rglob("*")] == []


def test_only_the_main_process_speaks(cwd: Path) -> None:
    for rank in ("0", "1"):
        done = run("train_ddpm.py", "--train.lr", "abc", cwd=cwd, WORLD_SIZE="2", RANK=rank)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == (1 if rank == "0" else 0)


@pytest.mark.parametrize(
    "line, extra, says",
    [
        # What torchrun and `accelerate launch --multi_gpu` start without a GPU: each process believes it is alone.
        ("", {}, ["2 processes", "ACCELERATE_USE_CPU=true"]),
        ("--data.name image_folder --data.root absent", {"ACCELERATE_USE_CPU": "true"}, ["absent", "does not exist"]),
    ],
    ids=["no GPU", "missing data"],
)
def test_two_processes_end_together(cwd: Path, line: str, extra: dict[str, str], says: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), **extra}
    ranks = [
        subprocess.Popen(
            command("train_ddpm.py", *line.split()),
            cwd=cwd,
            env=environment(**launch, RANK=rank, LOCAL_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        output = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    main, other = (subprocess.CompletedProcess((), rank.returncode, *out) for rank, out in zip(ranks, output))
    assert_refused("train_ddpm.py", main, says)
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")
    assert not any(cwd.iterdir())
