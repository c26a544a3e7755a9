"""Classifier-free guidance (Ho and Salimans 2022): a conditional output, moved away from the unconditional one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# (x [B, C, H, W], t) -> network output [B, C or 2C, H, W]; t the same training timestep for the whole batch
Network = Callable[[Tensor, int], Tensor]


class Guidance(NamedTuple):
    """How strongly, and where, the condition acts."""

    scale: float = 1.0  # out = uncond + scale (cond - uncond): 0 unconditional, 1 conditional
    rescale: float = 0.0  # 0 to 1, how far the output gets back the conditional one's standard deviation
    interval: tuple[float, float] | None = None  # noise levels sigma in which guidance acts; None: everywhere


UNGUIDED = Guidance()


def guided(model: nn.Module, cond: dict[str, Tensor] | None, guidance: Guidance, alpha_bar: Tensor) -> Network:
    """The network under a condition, guided.

    At scale 1, and outside the interval, only the conditional branch is evaluated, and at scale 0 only the
    unconditional one; else both, in one call of twice the batch. Outputs are mixed before x0 is clipped. Where the
    network predicts a variance too, that half is the conditional one's.

    Args:
        model: called as model(x, t, **cond); without cond it is the unconditional network. For guidance it also has
            null(n), the cond of n images that means no condition. Where it has encode(**cond), that is called once.
        cond: one row per image; None or empty: the unconditional network, whatever the scale.
        alpha_bar: [T], for the interval; sigma = sqrt((1 - alpha_bar) / alpha_bar) (Karras et al. 2022).
    """
    null: dict[str, Tensor] = {}
    if cond:
        null = model.null(len(next(iter(cond.values())))) if guidance.scale != 1 else {}
        if hasattr(model, "encode"):
            cond = cond if "emb" in cond else model.encode(**cond)
            null = model.encode(**null) if null else {}
    both = {name: torch.cat([cond[name], null[name]]) for name in null}

    def network(x: Tensor, t: int) -> Tensor:
        steps = torch.full((len(x),), t, device=x.device)
        if not cond:
            return model(x, steps)
        if guidance.scale == 1 or not _acts(guidance.interval, alpha_bar[t].item()):
            return model(x, steps, **cond)
        if guidance.scale == 0:
            return model(x, steps, **null)
        out, uncond = model(torch.cat([x, x]), torch.cat([steps, steps]), **both).chunk(2)
        channels = x.shape[1]  # what follows them is the variance
        mixed = mix(uncond[:, :channels], out[:, :channels], guidance)
        return torch.cat([mixed, out[:, channels:]], dim=1)

    return network


def mix(uncond: Tensor, cond: Tensor, guidance: Guidance) -> Tensor:
    """[B, C, H, W] twice -> the guided output (Ho and Salimans 2022, eq. 6, with scale = 1 + w).

    With rescale, its standard deviation over C, H, W comes back to that of `cond` (Lin et al. 2024, eq. 14 to 16).
    """
    out = torch.lerp(uncond, cond, guidance.scale)
    if guidance.rescale:
        spread = lambda value: value.flatten(1).std(1)[:, None, None, None]
        out = torch.lerp(out, out * (spread(cond) / spread(out)), guidance.rescale)
    return out


def _acts(interval: tuple[float, float] | None, alpha_bar: float) -> bool:
    """Whether guidance acts at a noise level (Kynkaanniemi et al. 2024, eq. 4)."""
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0 else float("inf")
    return interval is None or interval[0] <= sigma <= interval[1]
