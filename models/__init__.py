"""Networks by name. Pure torch: imports neither diffusions nor utils."""

from functools import partial

from torch import nn

from models.conditioning import build_condition
from models.patch_unet import PatchUNet
from models.unet import UNet

MODELS: dict[str, type[nn.Module]] = {"unet": UNet, "patch_unet": PatchUNet}


def build_model(options, image_size: int, channels: int, learn_variance: bool = False) -> nn.Module:
    """The network that `options` (the config's model section) describes, freshly initialised, in float32.

    Args:
        options: has name, dim, dim_mults, attn_resolutions, num_res_blocks, n_heads, norm_groups, dropout,
            and may have condition, adaptive_norm and cross_attn_resolutions, with what `conditioning.build_condition`
            reads.
        image_size: height and width of the images [pixels].
        channels: channels of the images; the output has twice as many where the variance is learned.

    Raises:
        ValueError: a name that is not in MODELS, or a condition that lacks something.
    """
    if options.name not in MODELS:
        raise ValueError(f"unknown network {options.name!r}; the networks are {', '.join(MODELS)}")
    return MODELS[options.name](
        image_size=image_size,
        in_channels=channels,
        out_channels=channels * (2 if learn_variance else 1),
        dim=options.dim,
        dim_mults=tuple(options.dim_mults),
        attn_resolutions=tuple(options.attn_resolutions),
        num_res_blocks=options.num_res_blocks,
        n_heads=options.n_heads,
        norm_groups=options.norm_groups,
        dropout=options.dropout,
        adaptive_norm=getattr(options, "adaptive_norm", False),
        condition=partial(build_condition, options),
        cross_attn_resolutions=tuple(getattr(options, "cross_attn_resolutions", ())),
    )
