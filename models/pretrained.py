"""Public layouts of the DDPM U-Net <-> ours: parameter names both ways, and the architecture that tensors imply.

The DDIM authors' checkpoints and the converted DDPM release have our names. diffusers' UNet2DModel has others, counts
the levels of the way up from the lowest resolution, and has linear layers where the attention has 1x1 convolutions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.unet import UNet

RENAMED = {  # ours -> diffusers
    "temb.dense.0.": "time_embedding.linear_1.",
    "temb.dense.1.": "time_embedding.linear_2.",
    "norm_out.": "conv_norm_out.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    ".block.": ".resnets.",
    ".attn.": ".attentions.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".temb_proj.": ".time_emb_proj.",
    ".nin_shortcut.": ".conv_shortcut.",
}
ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
OTHERS = {  # names that tell another network -> what it is
    r"^(ema_model\.|online_model\.|model\.)?(init_conv|downs\.0|ups\.0)\.": "denoising-diffusion-pytorch's U-Net",
    r"^(input_blocks|middle_block|output_blocks|time_embed)\.": "improved- or guided-diffusion's U-Net "
    "(adaptive group normalisation)",
    r"^(model\.)?(map_layer0|enc\.\d+x\d+_)": "a network of EDM",
    r"all_modules\.\d+\.": "a network of score_sde",
    r"(transformer_blocks|\.attn2\.|encoder_hid_proj)": "a network with cross-attention (text conditioning)",
    r"(class_embedding|class_emb|label_emb)\.": "a network with class embeddings",
    r"^(encoder|decoder|quant_conv|first_stage_model)\.": "an autoencoder or a latent diffusion model",
}


class Architecture(NamedTuple):
    """What the tensors of a U-Net say about it. Heads, norm groups, dropout and the image size leave no trace."""

    channels: int  # of the images
    learn_variance: bool  # the output has twice as many
    dim: int
    dim_mults: list[int]
    num_res_blocks: int
    attn_levels: list[int]  # levels with attention; level i works at image_size / 2^i

    def shapes(self) -> dict[str, list[int]]:
        """{parameter name: shape} of our network."""
        size = 2 ** len(self.dim_mults)
        with torch.device("meta"):
            network = UNet(
                image_size=size,
                in_channels=self.channels,
                out_channels=self.channels * (2 if self.learn_variance else 1),
                dim=self.dim,
                dim_mults=tuple(self.dim_mults),
                attn_resolutions=tuple(size >> level for level in self.attn_levels),
                num_res_blocks=self.num_res_blocks,
                norm_groups=1,
            )
        return {name: list(value.shape) for name, value in network.state_dict().items()}


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of either layout under our names and shapes, wrapper prefixes removed.

    Raises:
        ValueError: another network; the message says what it is, or which names were found.
    """
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    other = _other(state)
    if other:
        raise ValueError(f"it holds {other}, not the U-Net of DDPM")
    if has_diffusers_names(state):
        return from_diffusers(state)
    if not any(name.startswith(("down.", "temb.")) for name in state):
        raise ValueError(f"its tensors ({_some(list(state))}) have the names of no layout that is known here")
    return dict(state)


def has_diffusers_names(names: Iterable[str]) -> bool:
    return any(name.startswith("down_blocks.") for name in names)


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UNet2DModel's state dict, of either generation of attention names, under our names and shapes."""
    levels = _count(state, r"up_blocks\.(\d+)\.")
    result = {}
    for name, value in state.items():
        if ".attentions." in name:
            name = _replaced(_replaced(name, OLD_ATTENTION), {theirs: own for own, theirs in ATTENTION.items()})
            value = value[:, :, None, None] if value.dim() == 2 else value
        name = _replaced(name, {theirs: own for own, theirs in RENAMED.items()})
        name = re.sub(r"^down_blocks\.", "down.", name)
        name = re.sub(r"^up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        result[name] = value
    return result


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names and shapes of UNet2DModel."""
    levels = _count(state, r"up\.(\d+)\.")
    result = {}
    for name, value in state.items():
        if ".attn" in name:
            name, value = _replaced(name, ATTENTION), value.flatten(1) if value.dim() == 4 else value
        name = _replaced(name, RENAMED)
        name = re.sub(r"^down\.", "down_blocks.", name)
        name = re.sub(r"^up\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
        result[name] = value
    return result


def architecture(state: Mapping[str, Tensor]) -> Architecture:
    """Read the architecture off a state dict under our names, and hold every tensor against it.

    Raises:
        ValueError: tensors that no U-Net of DDPM has; the message names which differ.
    """
    try:
        dim, channels = _rows(state, "conv_in.weight"), state["conv_in.weight"].shape[1]
        out = _rows(state, "conv_out.weight")
        levels = _count(state, r"down\.(\d+)\.")
        widths = [_rows(state, f"down.{i}.block.0.conv1.weight") for i in range(levels)]
        projected = _rows(state, "down.0.block.0.temb_proj.weight")
    except KeyError as error:
        raise ValueError(f"it is almost the U-Net of DDPM, but has no weights {error.args[0]}") from None
    if projected == 2 * widths[0]:
        raise ValueError(
            "it holds a network with adaptive group normalisation (temb_proj has twice the channels of its block: "
            "resnet_time_scale_shift = scale_shift), not the U-Net of DDPM"
        )
    if any(width % dim for width in widths):
        raise ValueError(f"its widths {widths} are no multiples of the first convolution's {dim} channels")
    if out not in (channels, 2 * channels):
        raise ValueError(f"it has {out} output channels for {channels} of the image: wanted as many, or twice as many")
    found = Architecture(
        channels=channels,
        learn_variance=out == 2 * channels,
        dim=dim,
        dim_mults=[width // dim for width in widths],
        num_res_blocks=_count(state, r"down\.0\.block\.(\d+)\."),
        attn_levels=[i for i in range(levels) if any(name.startswith(f"down.{i}.attn.") for name in state)],
    )
    differ = differences(found.shapes(), {name: list(value.shape) for name, value in state.items()})
    if differ:
        raise ValueError(f"it is almost the U-Net of DDPM, but has {differ}")
    return found


def differences(wanted: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> str:
    """In words, which tensors are missing, extra or of another shape; empty where none is."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = sorted(name for name in wanted.keys() & found.keys() if list(wanted[name]) != list(found[name]))
    shapes = [f"{name}: {list(found[name])}, wanted {list(wanted[name])}" for name in shapes]
    kinds = {"missing": missing, "not in the network": extra, "of another shape": shapes}
    return "; ".join(f"{len(names)} tensors {kind} ({_some(names)})" for kind, names in kinds.items() if names)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _other(names: Iterable[str]) -> str | None:
    return next((what for pattern, what in OTHERS.items() if any(re.search(pattern, name) for name in names)), None)


def _rows(state: Mapping[str, Tensor], name: str) -> int:
    """Output channels of a layer's weights. Raises KeyError where `name` is missing or no matrix of at least one."""
    if name not in state or state[name].dim() < 2 or not state[name].numel():
        raise KeyError(name)
    return len(state[name])


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers `pattern` finds at the start of a name."""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
