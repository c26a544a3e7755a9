"""README.md of an exported diffusers folder: what the model is, and how to get the images that it gives here."""

from __future__ import annotations

from omegaconf import DictConfig

from utils.diffusers_format import SPACINGS

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- unconditional-image-generation
- ddpm
- ddim
---

# DDPM, {size} x {size} pixels

{about}

| | |
|---|---|
| network | the U-Net of DDPM (`UNet2DModel`), {parameters:,} parameters, {kind} |
| images | {channels} x {size} x {size}, in [-1, 1] |
| diffusion | T = {T}, {schedule} betas, the network predicts {objective} |

```python
{code}
```

{notes}"""


def model_card(config: DictConfig, kind: str, parameters: int) -> str:
    """Markdown with the hub's metadata. kind: of the weights, "EMA", "raw" or "only"."""
    data, diffusion = config.data, config.diffusion
    trained = "" if data.name == "image_folder" else f" Trained on `{data.name}`."
    zero = ", rescaled to zero terminal SNR" if diffusion.zero_terminal_snr else ""
    return CARD.format(
        about=f"Unconditional images by denoising diffusion.{trained}",
        size=data.image_size,
        channels=data.channels,
        parameters=parameters,
        kind={"EMA": "moving average of the weights", "raw": "weights without averaging", "only": "one set of weights"}[
            kind
        ],
        T=diffusion.total_steps,
        schedule=diffusion.beta_schedule + zero,
        objective={"pred_eps": "the noise", "pred_x0": "x0", "pred_v": "v"}[diffusion.objective],
        code=_code(config),
        notes="".join(f"- {line}\n" for line in limits(config)),
    )


def _code(config: DictConfig) -> str:
    T = config.diffusion.total_steps
    clipped = ", use_clipped_model_output=True" if config.sample.clip_denoised else ""
    calls = {"DDIMPipeline": f"{config.sample.skip_steps or min(50, T)}{clipped}", "DDPMPipeline": f"{T}"}
    if config.diffusion.learn_variance:
        del calls["DDIMPipeline"]
    return f"from diffusers import {', '.join(calls)}\n\n" + "\n\n".join(
        f'pipe = {pipeline}.from_pretrained("PATH")\nimages = pipe(batch_size=4, num_inference_steps={steps}).images'
        for pipeline, steps in calls.items()
    )


def limits(config: DictConfig) -> list[str]:
    """Where diffusers samples this model otherwise than sample_ddpm.py does, a sentence each."""
    sample, found = config.sample, []
    if config.diffusion.learn_variance:
        found.append("The network predicts its variance too, which DDIMPipeline can't read: use DDPMPipeline.")
    if sample.clip_denoised and not config.diffusion.learn_variance:
        found.append(
            "x0 is clipped at every step; DDIMPipeline derives the noise again from the clipped x0 only with "
            "`use_clipped_model_output=True`."
        )
    if sample.skip_type not in SPACINGS.values():
        found.append(f"diffusers has no {sample.skip_type} time grid: the scheduler's is leading.")
    else:
        found.append("Step counts that do not divide T give diffusers' DDIM other timesteps than the training code's.")
    if sample.sampler == "fixed-large" and sample.skip_type in ("trailing", "linspace"):
        found.append("Fewer than T steps of DDPMPipeline on this grid end with noise, because the last t is above 0.")
    return found
