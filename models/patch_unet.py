"""The U-Net on patches of 2x2 pixels: at a given cost it has four times the channels, which short budgets reward."""

import torch.nn.functional as F
from torch import Tensor

from models.unet import UNet

PATCH = 2


class PatchUNet(UNet):
    """`UNet` that sees 2x2 pixels as one with four times the channels, and gives them back as pixels.

    Narrow convolutions on large images are bound by memory, and on CPUs by much else; wide ones on small images use the
    arithmetic units. Arguments as of UNet, image_size in pixels of the image; attn_resolutions count the halved sizes.
    """

    def __init__(self, image_size: int, in_channels: int = 3, out_channels: int = 3, **options) -> None:
        super().__init__(image_size // PATCH, in_channels * PATCH**2, out_channels * PATCH**2, **options)
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """As UNet's: x_t [B, in_channels, H, W] and t [B] -> [B, out_channels, H, W]."""
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, PATCH), t, **cond), PATCH)
