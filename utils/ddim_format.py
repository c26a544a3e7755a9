"""The DDIM authors' config.yml and ckpt.pth <-> our config keys and weights.

Their ckpt.pth is a list: the model's state dict with the prefix `module.`, the optimizer's, the epoch, the step, and
where there is an EMA its state dict without prefix. Their trainer writes config.yml beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from utils.errors import InputError

KEYS = {  # theirs -> ours
    "data.image_size": "data.image_size",
    "data.channels": "data.channels",
    "model.ch": "model.dim",
    "model.ch_mult": "model.dim_mults",
    "model.num_res_blocks": "model.num_res_blocks",
    "model.attn_resolutions": "model.attn_resolutions",
    "model.dropout": "model.dropout",
    "diffusion.beta_schedule": "diffusion.beta_schedule",
    "diffusion.beta_start": "diffusion.beta_start",
    "diffusion.beta_end": "diffusion.beta_end",
    "diffusion.num_diffusion_timesteps": "diffusion.total_steps",
}
DEMANDS = {  # key of ours -> the values that their code has
    "model.name": ("unet",),
    "model.n_heads": (1,),
    "model.norm_groups": (32,),
    "model.condition": ("none",),
    "model.adaptive_norm": (False,),
    "diffusion.beta_schedule": ("linear", "quad", "sigmoid", "const", "jsd"),
    "diffusion.objective": ("pred_eps",),
    "diffusion.learn_variance": (False,),
    "diffusion.zero_terminal_snr": (False,),
}
DATASETS = {"cifar10": "CIFAR10"}


def config_keys(path: Path) -> dict[str, Any]:
    """{dotted key of ours: value} of their config.yml, written by hand or by their trainer.

    Raises:
        InputError: not YAML, or not theirs.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads argparse's Namespace, as which their trainer writes each section, as a plain dict."""

    namespace = "tag:yaml.org,2002:python/object:argparse.Namespace"
    Loader.add_constructor(namespace, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        tree = yaml.load(path.read_text(), Loader)
        found = {f"{section}.{name}": value for section, keys in tree.items() for name, value in keys.items()}
        variance = {"fixedlarge": "fixed-large", "fixedsmall": "fixed-small"}.get(found.get("model.var_type"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path} can't be read as the DDIM authors' config: {str(error).splitlines()[0]}") from None
    keys = {ours: found[theirs] for theirs, ours in KEYS.items() if theirs in found}
    keys = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in keys.items()}
    return keys | ({"sample.sampler": variance} if variance else {})


def check(config: DictConfig) -> None:
    """Raise InputError for a model that their code can't run; everything it lacks is named."""
    from omegaconf import OmegaConf

    found = {name: OmegaConf.select(config, name) for name in DEMANDS}
    wrong = [
        f"{name} = {found[name]} (it has {', '.join(map(str, values))})"
        for name, values in DEMANDS.items()
        if found[name] not in values
    ]
    if wrong:
        raise InputError(f"the DDIM authors' code can't run this model: {'; '.join(wrong)}")


def config_yml(config: DictConfig) -> str:
    """Our config as their config.yml."""
    from omegaconf import OmegaConf

    data, train = config.data, config.train
    tree: dict[str, dict[str, Any]] = {
        "data": {
            "dataset": DATASETS.get(data.name, data.name.upper()),
            "logit_transform": False,
            "uniform_dequantization": False,
            "gaussian_dequantization": False,
            "random_flip": data.random_flip,
            "rescaled": True,
            "num_workers": data.num_workers,
        },
        "model": {
            "type": "simple",
            "in_channels": data.channels,
            "out_ch": data.channels,
            "var_type": "fixedsmall" if config.sample.sampler == "fixed-small" else "fixedlarge",
            "ema_rate": train.ema_decay,
            "ema": True,
            "resamp_with_conv": True,
        },
        "diffusion": {},
        "training": {
            "batch_size": train.batch_size,
            "n_epochs": 10000,
            "n_iters": train.n_steps,
            "snapshot_freq": train.save_every,
            "validation_freq": train.valid_every,
        },
        "sampling": {"batch_size": 64, "last_only": True},
        "optim": {
            "weight_decay": train.weight_decay,
            "optimizer": "Adam",
            "lr": train.lr,
            "beta1": train.betas[0],
            "amsgrad": False,
            "eps": 1e-8,
            "grad_clip": train.clip_grad_norm or 1e9,
        },
    }
    for theirs, ours in KEYS.items():
        section, name = theirs.split(".")
        tree[section][name] = OmegaConf.select(config, ours)
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def states(raw: dict, ema: dict, config: DictConfig) -> list[Any]:
    """Their ckpt.pth, at epoch and step 0, with an optimizer that has not seen a gradient yet."""
    import torch

    adam = torch.optim.Adam(list(raw.values()), lr=config.train.lr, betas=tuple(config.train.betas))
    return [{f"module.{name}": value for name, value in raw.items()}, adam.state_dict(), 0, 0, ema]


def sets(loaded: list[Any]) -> dict[str, dict] | None:
    """{"raw": state dict, "EMA": state dict where there is one} of a loaded ckpt.pth; None for any other list."""
    dicts = [isinstance(entry, dict) for entry in loaded]
    if dicts[:4] != [True, True, False, False] or dicts[4:] not in ([], [True]):
        return None
    return {"raw": loaded[0]} | ({"EMA": loaded[4]} if len(loaded) == 5 else {})
