"""A U-Net for short budgets: on patches of 2x2 pixels, with a way past the network for the noise itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import linear
from models.unet import UNet

PATCH = 2


class PatchUNet(UNet):
    """`UNet` that sees 2x2 pixels as one with four times the channels, and gives them back as pixels.

    Narrow convolutions on large images are bound by memory, and on CPUs by much else; wide ones on small images use the
    arithmetic units. And the output is a(t) x_t + (1 + b(t)) F(x_t, t), with a and b learned, 0 at first: x_T is nearly
    all noise, which the paper's network has to carry through every one of its normalisations. (Karras et al. 2022,
    section 5, fix such coefficients by the noise level, which the network is not told here.)

    Arguments as of UNet, image_size in pixels of the image; attn_resolutions count the halved sizes.
    """

    def __init__(self, image_size: int, in_channels: int = 3, out_channels: int = 3, **options) -> None:
        super().__init__(image_size // PATCH, in_channels * PATCH**2, out_channels * PATCH**2, **options)
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.past = linear(4 * self.dim, 2)
        nn.init.zeros_(self.past.weight)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """As UNet's: x_t [B, in_channels, H, W] and t [B] -> [B, out_channels, H, W]."""
        out = F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, PATCH), t, **cond), PATCH)
        a, b = self.past(F.silu(self.time_embedding(t, x.dtype)))[..., None, None].split(1, dim=1)
        mean, variance = out.split([self.in_channels, self.out_channels - self.in_channels], dim=1)
        mean = a * x + (1 + b) * mean
        return torch.cat([mean, variance], dim=1) if variance.shape[1] else mean
