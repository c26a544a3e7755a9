"""What a configured process costs, and a word about a schedule that is likely a mistake."""

from __future__ import annotations

from omegaconf import DictConfig

from diffusions import SAMPLERS, GaussianDiffusion

MOST_SIGNAL = 0.01  # alpha_bar_T above which x_T is too far from the noise that sampling starts with


def signal_left(process: GaussianDiffusion) -> str | None:
    """A warning where alpha_bar_T is above MOST_SIGNAL; None where it is not."""
    left = process.alpha_bar[-1].item()
    if left <= MOST_SIGNAL:
        return None
    return (
        f"alpha_bar_T = {left:.3f}: x_T still holds signal, but sampling starts from noise: "
        "use more timesteps (diffusion.total_steps) or larger betas (diffusion.beta_end)"
    )


def evaluations(config: DictConfig) -> int:
    """Of the network, for each image of a cell; guidance takes two where one would do."""
    branches = 2 if config.model.condition != "none" and config.sample.guidance_scale not in (0, 1) else 1
    steps = config.sample.skip_steps or config.diffusion.total_steps
    return branches * SAMPLERS[config.sample.sampler].evaluations(steps)
