"""The optimizer, its learning-rate schedule, and the moving average of the weights."""

import math

import torch
from ema_pytorch import EMA
from torch import nn


def build_optimizer(net: nn.Module, options) -> torch.optim.AdamW:
    """Adam, with decoupled weight decay where train.weight_decay is above 0 (AdamW with 0 is Adam)."""
    return torch.optim.AdamW(
        net.parameters(), lr=options.lr, betas=tuple(options.betas), weight_decay=options.weight_decay, fused=True
    )


def lr_at(step: int, n_steps: int, options) -> float:
    """Learning rate of the update that starts from `step` (0 is the first): warm-up, then down to n_steps."""
    warmup = min((step + 1) / (options.warmup_steps + 1), 1.0)
    progress = min(max((step - options.warmup_steps) / max(n_steps - options.warmup_steps, 1), 0.0), 1.0)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return options.lr * warmup * decay[options.lr_schedule]


def set_lr(optimizer: torch.optim.Optimizer, step: int, n_steps: int, options) -> float:
    """Give `optimizer` the learning rate of `lr_at`, and return it."""
    lr = lr_at(step, n_steps, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def build_ema(net: nn.Module, options) -> EMA:
    """The EMA copy of `net`, which starts at its weights; call `update()` after every optimizer update.

    The k-th update (k = 1, 2, ...) has decay ema_decay, or with ema_warmup min(ema_decay, (1 + n) / (10 + n)) for
    n = k - 1. The wrapper's counters stay on the host, so that an update never waits for the device.
    """
    warmup = {"inv_gamma": 9.0, "power": 1.0} if options.ema_warmup else {"min_value": options.ema_decay}
    ema = EMA(
        net,
        beta=options.ema_decay,
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
        **warmup,
    )
    ema.eval()
    ema.update()  # the first call only copies: the average starts at the initial weights
    return ema
