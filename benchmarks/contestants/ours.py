"""This project: the real train_ddpm.py, held up between its batches, and generate as sample_ddpm.py calls it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
JOB = 50_000  # images: as for so many, sample_ddpm.py decides whether to compile


def gflop(work) -> float:
    from contestants import plain_loop

    return plain_loop.gflop(work)  # the same network


def train(work):
    from unittest.mock import patch

    import train_ddpm
    from contestants.held_up import HeldUp
    from utils import utilisation
    from utils.data.batches import Batches

    patch.object(utilisation, "AFTER", math.inf).start()  # no measurement of the machine in one of few rounds
    held_up, from_step = HeldUp(), Batches.from_step
    patch.object(Batches, "from_step", lambda self, *steps: held_up.batches(from_step(self, *steps))).start()
    args = ["-c", str(ROOT / "configs" / f"{work.preset.recipe}.yaml"), "-e", f"{work.scratch}/run"]
    args += ["--data.name", "image_folder", "--data.root", work.images, "--data.valid_fraction", "0"]
    args += ["--train.batch_size", str(work.batch_size), "--train.n_steps", "100000"]
    args += [f"--train.{kind}_every" + "=100000" for kind in ("save", "sample", "valid")]
    args += ["--train.compile", "true"] if work.on("compile") else []
    yield from held_up.units(lambda: train_ddpm.main(args))


def sample(work):
    from omegaconf import OmegaConf

    from diffusions import build_process
    from models import build_model
    from models.flops import forward_flops
    from utils import config, precision
    from utils.distributed import use_all_cores
    from utils.micro_batch import generate_fitting

    use_all_cores()
    recipe = ROOT / "configs" / f"{work.preset.recipe}.yaml"
    cfg = config.merge((str(recipe), config.read_yaml(recipe)))
    asked = {"sampler": work.sampler, "skip_type": "uniform", "skip_steps": work.steps}
    cfg.sample = OmegaConf.merge(cfg.sample, asked)
    name = precision.mixed_precision("auto")
    precision.set_determinism(precision.wants_determinism("auto"), tf32=name != "no")
    net = build_model(cfg.model, cfg.data.image_size, cfg.data.channels)
    net = net.to(work.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if precision.wants_compile("true" if work.on("compile") else "auto", lambda: JOB * work.steps * forward_flops(net)):
        net.compile()
    precision.keep_cast(net, precision.DTYPES[name])
    process, first = build_process(cfg.diffusion), 0
    yield
    while True:
        indices = list(range(first, first + work.batch_size))
        more = {"dtype": precision.DTYPES[name]}
        batches = generate_fitting(net, process, cfg.sample, indices, 2022, work.batch_size, **more)
        images = torch.cat([batch.images for batch in batches])
        assert images.dtype == torch.uint8 and len(images) == work.batch_size
        first += work.batch_size
        yield


def evaluate(work):
    """Features of images as evaluate_ddpm.py extracts them, from memory."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    from contestants.inception import generated, without_weights
    from utils.config import merge
    from utils.distributed import use_all_cores
    from utils.fidelity import open_extractor

    use_all_cores()
    with without_weights(inception):
        size = merge().evaluate.batch_size
        extractor = open_extractor("inception-v3-compat", None, ["fid"], size, work.device)
    batches = generated(work)
    yield
    while True:
        assert extractor([next(batches)])["2048"].shape == (work.batch_size, 2048)
        yield
