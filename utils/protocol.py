"""What must be known to repeat a result: the part that images are a function of, and the circumstances."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusions import GaussianDiffusion, time_grid
from models import norm_silu_cpu
from utils.captions import Asked

CONDITIONAL = ("classes", "adaptive_norm", "cross_attn_resolutions", "text_dim", "text_layers", "text_length")
ENCODER = ("text_encoder_width", "text_encoder_sha256")


def sampling_identity(
    weights, config: DictConfig, process: GaussianDiffusion, seed: int, precision: str, asked: Asked
) -> dict[str, Any]:
    """Everything that the pixels of image i depend on, besides i; `config` holds the sampling options.

    What only conditional networks have is left out of others: so it was before there were any.
    """
    options = config.sample
    grid = time_grid(process.alpha_bar, options.skip_type, options.skip_steps)
    model = OmegaConf.to_container(config.model)
    if model["condition"] == "none":
        model = {name: value for name, value in model.items() if name not in CONDITIONAL}
    place = model.pop("text_encoder")  # what it is, its SHA-256 says
    if place is None:
        model = {name: value for name, value in model.items() if name not in ENCODER}
    return {
        "weights_sha256": weights.sha256(),
        "model": model,
        "shape": [config.data.channels, config.data.image_size, config.data.image_size],
        "objective": process.objective,
        "sampler": options.sampler,
        "eta": options.eta,
        "clip_denoised": options.clip_denoised,
        "guidance_scale": options.guidance_scale,
        "skip_type": options.skip_type,
        "timesteps": grid.t[:-1].tolist(),
        "alpha_bar": grid.alpha_bar[:-1].tolist(),
        "seed": seed,
        "precision": precision,
        **asked.identity(),
        **(_guidance(options) if asked.entries else {}),
    }


def _guidance(options) -> dict[str, Any]:
    """What there is to say of guidance besides its scale."""
    interval = None if options.guidance_interval is None else list(options.guidance_interval)
    return {"guidance_rescale": options.guidance_rescale, "guidance_interval": interval}


def versions() -> dict[str, str]:
    """Of what computes; asked of the installation, for importing them all takes seconds."""
    packages = ("torchvision", "accelerate", "torch_fidelity", "numpy")
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version(name) for name in packages}


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, norms of {'PyTorch' if norm_silu_cpu.library() is None else 'our kernel'}"


def circumstances(weights, accelerator) -> dict[str, Any]:
    """What should not matter to the pixels beyond rounding, and is good to know."""
    return {
        "weights": str(weights.file) if weights else None,
        "weights_kind": weights.kind if weights else None,
        "processes": accelerator.num_processes,
        "hardware": hardware(accelerator.device),
        "versions": versions(),
    }
