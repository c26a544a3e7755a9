"""The mathematics of diffusion models. Pure torch: imports neither models nor utils."""

from diffusions.generate import Batch, generate
from diffusions.process import GaussianDiffusion, Prediction, build_process
from diffusions.samplers import SAMPLERS, Sampler, Step
from diffusions.schedules import BETA_SCHEDULES, SKIP_TYPES, TimeGrid, time_grid

__all__ = [
    "BETA_SCHEDULES",
    "SAMPLERS",
    "SKIP_TYPES",
    "Batch",
    "GaussianDiffusion",
    "Prediction",
    "Sampler",
    "Step",
    "TimeGrid",
    "build_process",
    "generate",
    "time_grid",
]
