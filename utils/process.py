"""A word about a diffusion process whose schedule is likely a mistake."""

from __future__ import annotations

from diffusions import GaussianDiffusion

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
