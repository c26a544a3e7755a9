"""How much arithmetic a network does."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(net: nn.Module) -> int:
    """Floating-point operations of one forward pass of one image, without a condition; a multiply-add counts as two.

    Convolutions, matrix products and attention are counted; a training step takes about three times as many. `net` has
    in_channels and image_size.
    """
    outline = copy.deepcopy(net).to("meta").float().eval()
    outline._compiled_call_impl = None
    x = torch.empty(1, net.in_channels, net.image_size, net.image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outline(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    return counter.get_total_flops()
