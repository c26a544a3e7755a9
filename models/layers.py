"""Building blocks of the DDPM U-Net (Ho et al. 2020, appendix B); parameter names are the public checkpoints'."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norm_silu import Norm


def fan_average_uniform_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Uniform initialisation with variance scale / mean(fan_in, fan_out), in place; a scale of 0 gives almost 0."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = math.sqrt(3 * max(scale, 1e-10) / ((fan_in + fan_out) / 2))
    with torch.no_grad():
        return weight.uniform_(-bound, bound)


def conv(c_in: int, c_out: int, size: int, stride: int = 1, padding: int = 0, scale: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(c_in, c_out, size, stride, padding)
    fan_average_uniform_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def linear(c_in: int, c_out: int) -> nn.Linear:
    layer = nn.Linear(c_in, c_out)
    fan_average_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def norm(groups: int, channels: int) -> Norm:
    return Norm(groups, channels, eps=1e-6)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """t [B] -> [B, dim] float32: sines, then cosines, of t at frequencies exp(-i ln(10000) / (dim/2 - 1))."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / max(half - 1, 1)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """norm, SiLU, conv; + projected time embedding; norm, SiLU, dropout, conv; + shortcut (1x1 where widths differ).

    adaptive: the embedding scales and shifts what the second norm gives, in place of being added before it (Nichol and
    Dhariwal 2021, section 2; adaptive group normalisation).
    """

    def __init__(self, c_in: int, c_out: int, c_time: int, groups: int, dropout: float, adaptive: bool = False) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.norm1 = norm(groups, c_in)
        self.conv1 = conv(c_in, c_out, 3, padding=1)
        self.temb_proj = linear(c_time, 2 * c_out if adaptive else c_out)
        self.norm2 = norm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(c_out, c_out, 3, padding=1, scale=0)
        if c_in != c_out:
            self.nin_shortcut = conv(c_in, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x [B, c_in, H, W], temb [B, c_time] already through SiLU -> [B, c_out, H, W]."""
        h = self.conv1(self.norm1(x, silu=True))
        emb = self.temb_proj(temb)
        if self.adaptive:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h, silu=True, scale=scale, shift=shift, dropout=self.dropout)
        else:
            h = self.norm2(h, emb, silu=True, dropout=self.dropout)
        h = self.conv2(h)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, L, C / heads] thrice -> the same: softmax attention, scale (C / heads)^-1/2."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 1024:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # on CPUs twice as fast as PyTorch's kernel
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Residual self-attention over the H*W positions; one head in the paper, scale (C / heads)^-1/2."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(groups, channels)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1, scale=0)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        q, k, v = (
            layer(h).view(batch, self.heads, channels // self.heads, height * width).transpose(2, 3)
            for layer in (self.q, self.k, self.v)
        )
        h = attend(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Pad right and bottom by one, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def twice_the_size(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W], nearest neighbour."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    batch, channels, height, width = x.shape  # compiled, the gradient of this is a sum; interpolate's adds atomically
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return x.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(twice_the_size(x))
