"""denoising-diffusion-pytorch: its Trainer, held up between its batches, and its sampler, with its own network."""

from __future__ import annotations

import torch


def build(work):
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    preset = work.preset
    net = Unet(
        preset.lucidrains_dim, dim_mults=preset.dim_mults, channels=preset.channels, dropout=preset.dropout,
        flash_attn=work.on("flash"),
    )  # fmt: skip
    return GaussianDiffusion(
        net, image_size=preset.image_size, timesteps=1000, sampling_timesteps=work.steps, objective="pred_noise",
        beta_schedule="linear",
    )  # fmt: skip


def gflop(work) -> float:
    from contestants import forward_gflop

    return forward_gflop(build(work).model, work.preset.image_size, work.preset.channels)


def train(work):
    from denoising_diffusion_pytorch import Trainer

    from contestants.held_up import HeldUp

    trainer = Trainer(
        build(work), work.images, train_batch_size=work.batch_size, train_num_steps=100_000,
        save_and_sample_every=1_000_000, results_folder=f"{work.scratch}/results", calculate_fid=False,
        amp=work.on("bf16"), mixed_precision_type="bf16",
    )  # fmt: skip
    held_up = HeldUp()
    trainer.dl = held_up.batches(trainer.dl)
    yield from held_up.units(trainer.train)


def sample(work):
    diffusion = build(work).to(work.device).eval()
    if work.sampler == "fixed-small":  # the last of its 1,000 steps
        diffusion.is_ddim_sampling, diffusion.num_timesteps = False, work.steps
    yield
    while True:
        with torch.inference_mode(), torch.autocast(work.device.type, torch.bfloat16, enabled=work.on("bf16")):
            images = diffusion.sample(batch_size=work.batch_size)
        assert len(images) == work.batch_size
        yield


@torch.inference_mode()
def evaluate(work):
    """Features as its FIDEvaluation extracts them, of images in [0, 1] in memory."""
    from denoising_diffusion_pytorch.fid_evaluation import FIDEvaluation
    from pytorch_fid import inception

    from contestants.inception import generated, without_weights

    with without_weights(inception):
        judge = FIDEvaluation(work.batch_size, None, None, work.preset.channels, device=work.device)
    batches = generated(work)
    yield
    while True:
        features = judge.calculate_inception_features(next(batches).to(work.device) / 255).cpu()
        assert features.shape == (work.batch_size, 2048)
        yield
