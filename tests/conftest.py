"""Running the scripts as a user would: as processes, through the documented shell commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported: tiny networks gain nothing from more threads, and threads that spin slow down all others.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

# The first backward pass of a process starts a thread per device, after which its forks can't train. Where it comes
# before anything has used fake tensors, which pretend that there are eight GPUs, there are none to start.
torch.ones(1, requires_grad=True).sum().backward()

ROOT = Path(__file__).resolve().parent.parent

# A network that trains in seconds, on 180 digits so that a few steps cross an epoch.
TINY = [
    *("--model.dim", "8", "--model.norm_groups", "4", "--model.dim_mults", "[1,2]", "--train.batch_size", "16"),
    *("--data.valid_fraction", "0.9", "--train.n_valid", "64", "--train.n_samples", "4", "--sample.skip_steps", "3"),
    *("--train.warmup_steps", "2", "--train.log_every", "1"),
]


def command(script: str, *args: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, args)]


def environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WORLD_SIZE", "RANK"))
    }
    return {**kept, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def run(script: str, *args: object, cwd: Path, processes: int = 1, status: int = 0) -> subprocess.CompletedProcess:
    """Run a script to its end and check its exit status."""
    done = subprocess.run(
        command(script, *args, processes=processes),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny network, trained for 12 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run("train_ddpm.py", "-e", folder / "run", *TINY, "--train.n_steps", 12, "--train.save_every", 6, cwd=folder)
    return folder / "run"
