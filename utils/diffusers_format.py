"""diffusers' config files (UNet2DModel, DDPM-like schedulers) <-> our config keys.

An option that a file leaves out has diffusers' default. Options that the networks here do not have are refused by name.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from utils.errors import InputError

FIXED = {  # UNet2DModel options that the U-Net of DDPM leaves no choice in: its value, diffusers' default
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
FREE = {  # and those that say what our config keys say
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("layers_per_block", "dropout", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups"),
    *("time_embedding_dim", "num_train_timesteps"),
}
MEANS = {  # what an option of another kind of network is about
    "resnet_time_scale_shift": "adaptive group normalisation",
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
}
BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}  # -> with attention
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

OBJECTIVES = {"epsilon": "pred_eps", "sample": "pred_x0", "v_prediction": "pred_v"}
VARIANCES = {"fixed_large": "fixed-large", "fixed_small": "fixed-small", "learned_range": "learned-range"}
BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
SPACINGS = {"leading": "uniform", "trailing": "trailing", "linspace": "linspace"}
SCHEDULERS = {  # class -> its counterpart here; of DDPM's the variance decides
    "DDPMScheduler": None,
    "DDPMParallelScheduler": None,
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
}
CLIPS = ("DDPM", "DDIM")  # schedulers that clip x0, unless told otherwise


def unet_keys(options: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """UNet2DModel's config.json -> ({dotted key of ours: value}, the levels with attention).

    Raises:
        ValueError: options that the networks here do not have; all of them are named.
    """
    name = options.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(f"it describes a {name}, not a UNet2DModel")
    given = {name: value for name, value in options.items() if not name.startswith("_")}
    given["act_fn"] = {"swish": "silu"}.get(given.get("act_fn", "silu"), given.get("act_fn", "silu"))
    wrong = [
        f"{option} = {given.get(option, default)}"
        + (f" ({MEANS[option]})" if option in MEANS else f", wanted {value}")
        + ("" if option in given else f" (the default of diffusers {default})")
        for option, (value, default) in FIXED.items()
        if given.get(option, default) != value
    ]
    wrong += [f"{option} = {value}" for option, value in given.items() if value and option not in FIXED.keys() | FREE]
    widths = list(given.get("block_out_channels", (224, 448, 672, 896)))
    down = list(given.get("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * 3)))
    up = list(given.get("up_block_types", (*["AttnUpBlock2D"] * 3, "UpBlock2D")))
    wrong += [f"block type {block}" for block in dict.fromkeys([*down, *up]) if block not in BLOCKS | UP_BLOCKS]
    if wrong:
        raise ValueError(f"it has options that the U-Net of DDPM does not have: {'; '.join(wrong)}")
    attention = [BLOCKS.get(block) for block in down]
    if attention != [UP_BLOCKS.get(block) for block in reversed(up)] or len(down) != len(widths):
        raise ValueError(f"its levels differ on the way down and up: {', '.join(down)} against {', '.join(up)}")
    dim, groups = widths[0], given.get("norm_num_groups", 32)
    if any(width % dim for width in widths):
        raise ValueError(f"its block_out_channels {widths} are no multiples of the first, {dim}")
    for option, ours in (("time_embedding_dim", 4 * dim), ("attn_norm_num_groups", groups)):
        if given.get(option) not in (None, ours):
            raise ValueError(f"its {option} = {given[option]}, but the U-Net of DDPM has {ours}")
    size = given.get("sample_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if height != width:
        raise ValueError(f"its sample_size = {size} is not square")
    channels, out = given.get("in_channels", 3), given.get("out_channels", 3)
    if out not in (channels, 2 * channels):
        raise ValueError(f"it has out_channels = {out} for in_channels = {channels}: wanted as many, or twice as many")
    keys = {
        "data.channels": channels,
        "model.dim": dim,
        "model.dim_mults": [width // dim for width in widths],
        "model.num_res_blocks": given.get("layers_per_block", 2),
        "model.norm_groups": groups,
        "model.dropout": given.get("dropout", 0.0),
        "model.n_heads": _heads(given.get("attention_head_dim", 8), widths, attention),
        "diffusion.learn_variance": out == 2 * channels,
    }
    if height is not None:
        keys["data.image_size"] = height
    return keys, [level for level, has in enumerate(attention) if has]


def _heads(head_dim: int | None, widths: list[int], attention: list[bool]) -> int:
    attended = sorted({width for width, has in zip(widths, attention) if has} | {widths[-1]})  # the middle always
    heads = {1 if head_dim is None else width // head_dim for width in attended}
    if len(heads) > 1:
        raise ValueError(
            f"its attention_head_dim = {head_dim} means {sorted(heads)} heads at the attended widths {attended}; "
            "here every attention has the same number of heads"
        )
    return heads.pop()


def unet_json(config: DictConfig) -> dict[str, Any]:
    """Our config -> UNet2DModel's config.json. Raises InputError for what it can't say; all of it is named."""
    data, model = config.data, config.model
    widths = [model.dim * mult for mult in model.dim_mults]
    attention = [data.image_size >> level in model.attn_resolutions for level in range(len(widths))]
    attended = sorted({width for width, has in zip(widths, attention) if has} | {widths[-1]})
    wrong = []
    if model.name != "unet":
        wrong.append(f"model.name = {model.name}")
    if model.dim_mults[0] != 1:
        wrong.append(f"model.dim_mults[0] = {model.dim_mults[0]} (its first level is as wide as the first convolution)")
    if model.n_heads > 1 and len(attended) > 1:
        wrong.append(f"model.n_heads = {model.n_heads} with attention at several widths {attended} (it fixes a width)")
    if model.dim < 4:
        wrong.append(f"model.dim = {model.dim} (it needs at least two frequencies of time)")
    if model.condition != "none":
        wrong.append(f"model.condition = {model.condition} (a UNet2DModel takes no text, and classes otherwise)")
    if model.adaptive_norm:
        wrong.append("model.adaptive_norm = true (it has another order of scale and shift)")
    if wrong:
        raise InputError(f"diffusers' UNet2DModel can't hold this network: {'; '.join(wrong)}")
    return {
        "_class_name": "UNet2DModel",
        **{option: value for option, (value, _) in FIXED.items()},
        "sample_size": data.image_size,
        "in_channels": data.channels,
        "out_channels": data.channels * (2 if config.diffusion.learn_variance else 1),
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "attention_head_dim": None if model.n_heads == 1 else attended[0] // model.n_heads,
        "norm_num_groups": model.norm_groups,
        "attn_norm_num_groups": None,
        "dropout": model.dropout,
    }


def scheduler_keys(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A scheduler's config -> ({dotted key of ours: value}, what it asks of sampling that does not exist here).

    Raises:
        ValueError: another kind of schedule; named.
    """
    name = options.get("_class_name", "DDPMScheduler")
    if name not in SCHEDULERS:
        raise ValueError(f"it describes a {name}; those that can be read are {', '.join(SCHEDULERS)}")
    variance = options.get("variance_type", "fixed_small").removesuffix("_log")
    if variance not in VARIANCES:
        raise ValueError(f"its variance_type = {variance}; wanted {', '.join(VARIANCES)}")
    objective = options.get("prediction_type", "epsilon")
    if objective not in OBJECTIVES:
        raise ValueError(f"its prediction_type = {objective}; wanted {', '.join(OBJECTIVES)}")
    multistep = name.startswith(("DPM", "UniPC"))
    spacing = options.get("timestep_spacing", "linspace" if multistep else "leading")
    if spacing not in SPACINGS:
        raise ValueError(f"its timestep_spacing = {spacing}; wanted {', '.join(SPACINGS)}")
    keys = {
        **_betas(options),
        "diffusion.zero_terminal_snr": bool(options.get("rescale_betas_zero_snr", False)),
        "diffusion.objective": OBJECTIVES[objective],
        "sample.sampler": SCHEDULERS[name] or VARIANCES[variance],
        "sample.skip_type": SPACINGS[spacing],
        "sample.clip_denoised": bool(options.get("clip_sample", name.startswith(CLIPS))),
    }
    other = {"steps_offset": 0, "thresholding": False, "clip_sample_range": 1.0, "set_alpha_to_one": True}
    notes = [f"{option} = {options[option]}" for option, value in other.items() if options.get(option, value) != value]
    return keys, notes


def _betas(options: dict[str, Any]) -> dict[str, Any]:
    ends = (options.get("beta_start", 1e-4), options.get("beta_end", 0.02))
    trained, name = options.get("trained_betas"), options.get("beta_schedule", "linear")
    if trained is not None:
        name, ends = _recognised(trained, ends)
    elif name not in BETAS:
        raise ValueError(f"its beta_schedule = {name}; wanted {', '.join(BETAS)}")
    return {
        "diffusion.total_steps": options.get("num_train_timesteps", 1000) if trained is None else len(trained),
        "diffusion.beta_schedule": BETAS.get(name, name),
        **dict(zip(("diffusion.beta_start", "diffusion.beta_end"), ends)),
    }


def _recognised(trained: list[float], ends: tuple[float, float]) -> tuple[str, tuple[float, float]]:
    """The schedule, and its first and last beta, that gives these betas to float32 precision."""
    import torch

    from diffusions.schedules import BETA_SCHEDULES

    betas = torch.tensor(trained, dtype=torch.float64)
    for start, end in (ends, (trained[0], trained[-1])):
        for name, schedule in BETA_SCHEDULES.items():
            if torch.allclose(schedule(len(betas), start, end), betas, rtol=1e-5, atol=1e-8):
                return name, ((start, end) if name not in ("cosine", "jsd") else ends)
    raise ValueError(f"its trained_betas, {len(betas)} from {trained[0]:g} to {trained[-1]:g}, are no schedule here")


def scheduler_json(config: DictConfig) -> dict[str, Any]:
    """Our config -> DDPMScheduler's config, from which diffusers derives its other schedulers.

    A schedule that one of them does not know by name is written out, as trained_betas.
    """
    from diffusions.schedules import BETA_SCHEDULES

    diffusion, sample = config.diffusion, config.sample
    names = {ours: theirs for theirs, ours in BETAS.items() if theirs != "sigmoid"}  # DDIMScheduler lacks that one
    betas = BETA_SCHEDULES[diffusion.beta_schedule](diffusion.total_steps, diffusion.beta_start, diffusion.beta_end)
    variances = {ours: theirs for theirs, ours in VARIANCES.items()}
    small = "learned_range" if diffusion.learn_variance else "fixed_small"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.total_steps,
        "beta_schedule": names.get(diffusion.beta_schedule, "linear"),
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None if diffusion.beta_schedule in names else betas.tolist(),
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "prediction_type": {ours: theirs for theirs, ours in OBJECTIVES.items()}[diffusion.objective],
        "variance_type": "learned_range" if diffusion.learn_variance else variances.get(sample.sampler, small),
        "clip_sample": sample.clip_denoised,
        "clip_sample_range": 1.0,
        "timestep_spacing": {ours: theirs for theirs, ours in SPACINGS.items()}.get(sample.skip_type, "leading"),
        "steps_offset": 0,
    }
