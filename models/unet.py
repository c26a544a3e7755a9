"""The U-Net of DDPM (Ho et al. 2020), exactly: every public checkpoint of it loads under these parameter names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.conditioning import CrossAttention, FeatureCondition, TextCondition
from models.layers import Attention, Downsample, ResBlock, Upsample, conv, linear, norm, sinusoidal_embedding


class UNet(nn.Module):
    """Noise-prediction network.

    Args:
        image_size: height and width of the images [pixels]; a multiple of 2^(levels - 1).
        in_channels: channels of x_t.
        out_channels: channels of the output; twice in_channels where the variance is learned.
        dim: width of the first level.
        dim_mults: width of each level as a multiple of dim.
        attn_resolutions: image sizes whose residual blocks are followed by attention; the middle always has it.
        num_res_blocks: residual blocks per level on the way down, one more on the way up.
        n_heads: attention heads (1 in the paper).
        norm_groups: groups of the group normalisations (32 in the paper).
        dropout: dropout probability inside residual blocks.
        gradient_checkpointing: recompute residual blocks in the backward pass.
        adaptive_norm: the time embedding scales and shifts in the residual blocks, in place of being added.
        condition: c_time -> what the network is told besides x_t and t (models/conditioning.py), or None.
        cross_attn_resolutions: image sizes whose residual blocks are followed by cross-attention to a text; the middle
            always has it.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        dim: int = 128,
        dim_mults: tuple[int, ...] = (1, 2, 2, 2),
        attn_resolutions: tuple[int, ...] = (16,),
        num_res_blocks: int = 2,
        n_heads: int = 1,
        norm_groups: int = 32,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        adaptive_norm: bool = False,
        condition: Callable[[int], nn.Module | None] | None = None,
        cross_attn_resolutions: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.dim = dim
        self.gradient_checkpointing = gradient_checkpointing
        c_time, levels = 4 * dim, len(dim_mults)

        def res_block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, c_time, norm_groups, dropout, adaptive_norm)

        def attention(channels: int) -> Attention:
            return Attention(channels, n_heads, norm_groups)

        def cross_attention(channels: int) -> CrossAttention:
            return CrossAttention(channels, self.condition.dim, n_heads, norm_groups)

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([linear(dim, c_time), linear(c_time, c_time)])
        self.condition = condition(c_time) if condition else None
        reads_text = isinstance(self.condition, (TextCondition, FeatureCondition))
        crossed = cross_attn_resolutions if reads_text else ()
        self.conv_in = conv(in_channels, dim, 3, padding=1)

        self.down = nn.ModuleList()
        skips, width = [dim], dim  # widths of the feature maps that the way up will concatenate
        for i, mult in enumerate(dim_mults):
            level = _level()
            for _ in range(num_res_blocks):
                level.block.append(res_block(width, dim * mult))
                width = dim * mult
                skips.append(width)
                if image_size >> i in attn_resolutions:
                    level.attn.append(attention(width))
                if image_size >> i in crossed:
                    level.cross.append(cross_attention(width))
            if i < levels - 1:
                level.downsample = Downsample(width)
                skips.append(width)
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = res_block(width, width)
        self.mid.attn_1 = attention(width)
        self.mid.cross_1 = cross_attention(width) if reads_text else None
        self.mid.block_2 = res_block(width, width)

        self.up = nn.ModuleList()  # up[i] belongs to level i; executed from the last to the first
        for i, mult in reversed(list(enumerate(dim_mults))):
            level = _level()
            for _ in range(num_res_blocks + 1):
                level.block.append(res_block(width + skips.pop(), dim * mult))
                width = dim * mult
                if image_size >> i in attn_resolutions:
                    level.attn.append(attention(width))
                if image_size >> i in crossed:
                    level.cross.append(cross_attention(width))
            if i > 0:
                level.upsample = Upsample(width)
            self.up.insert(0, level)

        self.norm_out = norm(norm_groups, width)
        self.conv_out = conv(width, out_channels, 3, padding=1, scale=0)

    def encode(self, **cond: Tensor) -> dict[str, Tensor]:
        """What is given, as in `forward` -> what that reads of it: emb, and of a text context and presence."""
        return self.condition(**cond)

    def null(self, n: int) -> dict[str, Tensor]:
        """The `cond` of n images that means no condition."""
        return self.condition.null(n)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """x_t [B, in_channels, H, W] and t [B] int64 in 0..T-1 -> [B, out_channels, H, W].

        cond, where the network has a condition: `label` [B], `tokens` [B, L], `features` [B, L, D] and `present`
        [B, L], or what `encode` made of them; nothing means no condition for any image.
        """
        temb = sinusoidal_embedding(t, self.dim).to(x.dtype)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        text = ()
        if self.condition is not None:
            cond = cond or self.null(len(x))
            cond = cond if "emb" in cond else self.encode(**cond)
            temb = temb + cond["emb"]
            text = (cond["context"], cond["presence"]) if "context" in cond else ()
        temb = F.silu(temb)

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for j, block in enumerate(level.block):
                h = self._res(block, h, temb)
                h = level.attn[j](h) if len(level.attn) else h
                h = level.cross[j](h, *text) if len(level.cross) else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)

        h = self._res(self.mid.block_1, h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.cross_1(h, *text) if self.mid.cross_1 is not None else h
        h = self._res(self.mid.block_2, h, temb)

        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = self._res(block, torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[j](h) if len(level.attn) else h
                h = level.cross[j](h, *text) if len(level.cross) else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(self.norm_out(h, silu=True))

    def _res(self, block: ResBlock, h: Tensor, temb: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, h, temb, use_reentrant=False)
        return block(h, temb)


def _level() -> nn.Module:
    level = nn.Module()
    level.block, level.attn, level.cross = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
    return level
