"""What must be known to repeat a result: the part that images are a function of, and the circumstances."""

from __future__ import annotations

import platform
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusions import GaussianDiffusion, time_grid


def sampling_identity(
    weights, config: DictConfig, process: GaussianDiffusion, seed: int, precision: str
) -> dict[str, Any]:
    """Everything that the pixels of image i depend on, besides i; `config` holds the sampling options."""
    options = config.sample
    grid = time_grid(process.alpha_bar, options.skip_type, options.skip_steps)
    return {
        "weights_sha256": weights.sha256(),
        "model": OmegaConf.to_container(config.model),
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
    }


def versions() -> dict[str, str]:
    import accelerate
    import numpy
    import torch_fidelity
    import torchvision

    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return found | {
        "accelerate": accelerate.__version__,
        "torch_fidelity": torch_fidelity.__version__,
        "numpy": numpy.__version__,
    }


def hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def circumstances(weights, accelerator) -> dict[str, Any]:
    """What should not matter to the pixels beyond rounding, and is good to know."""
    return {
        "weights": str(weights.file) if weights else None,
        "weights_kind": weights.kind if weights else None,
        "processes": accelerator.num_processes,
        "hardware": hardware(accelerator.device),
        "versions": versions(),
    }
