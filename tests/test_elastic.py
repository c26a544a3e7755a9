"""The same run on 1, 2 and 4 processes: the same inputs at every step, the same losses, checkpoints for all."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from in_process import forked

import train_ddpm
from diffusions.process import GaussianDiffusion

BATCH, MICRO = 16, 6
ARGS = [*TINY, "--train.mixed_precision", "no", "--train.micro_batch", MICRO, "--model.dropout", 0, "--train.log_with"]
ARGS += ["none", "--data.random_flip", "true", "--train.sample_every", 100, "--model.num_res_blocks", 1]
WORLDS = (1, 2, 4)


def record() -> None:
    """Keep what the loss is given, and write it to RANK-WORLD.pt when the process group ends."""
    loss, seen = GaussianDiffusion.loss, []

    def watched(self, model, x0, t, eps):
        if model.training:
            seen.append((x0.clone(), t.clone(), eps.clone()))
            torch.save(seen, f"{os.environ['RANK']}-{os.environ['WORLD_SIZE']}.pt")
        return loss(self, model, x0, t, eps)

    GaussianDiffusion.loss = watched


def hashes(folder: Path, world: int) -> list[str]:
    """Per step, of the global batch's images (flipped), timesteps and noise."""
    n_parts = -(-BATCH // world // MICRO)
    ranks = [torch.load(folder / f"{rank}-{world}.pt", weights_only=True) for rank in range(world)]
    steps = [[part for rank in ranks for part in rank[i : i + n_parts]] for i in range(0, len(ranks[0]), n_parts)]
    joined = [b"".join(torch.cat(side).numpy().tobytes() for side in zip(*step)) for step in steps]
    return [hashlib.sha256(data).hexdigest() for data in joined]


def losses(run: Path, name: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Twenty steps on each number of processes, in folders 1, 2 and 4."""
    folder = tmp_path_factory.mktemp("elastic")
    for world in WORLDS:
        args = ("-e", str(world), *ARGS, "--train.n_steps", 20, "--train.save_every", 10)
        forked(train_ddpm.main, *args, cwd=folder, processes=world, prepare=record)
    return folder


def test_every_step_sees_the_same_images_timesteps_and_noise(runs: Path) -> None:
    alone, *others = (hashes(runs, world) for world in WORLDS)
    assert len(set(alone)) == 20 and all(found == alone for found in others)


def test_the_first_20_losses_agree_in_fp32(runs: Path) -> None:
    alone, *others = (losses(runs / str(world)) for world in WORLDS)
    assert len(alone) == 20 and alone[-1] < alone[0]
    for found in others:
        assert found == pytest.approx(alone, abs=1e-5)
    rates = [losses(runs / str(world), "lr") for world in WORLDS]
    assert len(rates[0]) == 20 and rates[0] == rates[1] == rates[2]


def test_a_checkpoint_of_two_processes_goes_on_with_one_or_four(runs: Path, tmp_path: Path) -> None:
    for world in (1, 4):
        shutil.copytree(runs / "2", tmp_path / str(world))
        args = ("-e", str(world), "-r", "auto", "--train.n_steps", 24)
        forked(train_ddpm.main, *args, cwd=tmp_path, processes=world, prepare=record)
    one, four = (hashes(tmp_path, world) for world in (1, 4))
    assert one == four and len(one) == 4 and not set(one) & set(hashes(runs, 1))
    one, four = (losses(tmp_path / str(world)) for world in (1, 4))
    assert len(one) == 24 and one == pytest.approx(four, abs=1e-5)
