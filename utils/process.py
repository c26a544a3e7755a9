"""The diffusion process that a configuration describes, with a word where its schedule is likely a mistake."""

from __future__ import annotations

from diffusions import GaussianDiffusion, build_process
from utils.cli import say

MOST_SIGNAL = 0.01  # alpha_bar_T above which x_T is too far from the noise that sampling starts with


def open_process(options) -> GaussianDiffusion:
    """`build_process` of the config's diffusion section; warns where alpha_bar_T is above MOST_SIGNAL."""
    process = build_process(options)
    left = process.alpha_bar[-1].item()
    if left > MOST_SIGNAL:
        say(
            f"warning: alpha_bar_T = {left:.2g}: the last timestep still holds signal, but sampling starts at pure "
            "noise: use more timesteps (diffusion.total_steps) or larger betas (diffusion.beta_end)"
        )
    return process
