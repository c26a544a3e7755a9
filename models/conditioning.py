"""What a network can be told besides x_t and t: a class, or a text.

A condition turns what is given (`label`, `tokens`, or `features` and `present`) into what the U-Net reads: `emb`
[B, c_time], added to the time embedding, and for text also `context` [B, L, D] with `presence` [B, L] in [0, 1], read
by cross-attention. These are made once per image, not once per step, and can be interpolated entry by entry.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import conv, linear, norm

PAD, START = 0, 257  # tokens; a byte b of the text is b + 1
N_TOKENS = 258


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """Texts, in any case -> [B, length] int64: START, then the bytes of the text in lower case, then PAD.

    Raises:
        ValueError: a text of more than length - 1 bytes.
    """
    rows = torch.full((len(texts), length), PAD)
    for row, text in zip(rows, texts):
        data = text.casefold().encode()
        if len(data) > length - 1:
            raise ValueError(f"{text!r} has {len(data)} bytes, but at most {length - 1} are read")
        row[0] = START
        row[1 : len(data) + 1] = torch.tensor(list(data), dtype=torch.int64) + 1
    return rows


class ClassCondition(nn.Module):
    """A learned embedding for each class, and one for no class (index n_classes), which starts at zero."""

    def __init__(self, n_classes: int, c_time: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes + 1, c_time)
        with torch.no_grad():
            self.embedding.weight[n_classes] = 0

    def forward(self, label: Tensor) -> dict[str, Tensor]:
        """label [B] int64 in 0..n_classes -> emb [B, c_time]."""
        return {"emb": self.embedding(label)}

    def null(self, n: int) -> dict[str, Tensor]:
        """The input that means no condition, n times."""
        return {"label": torch.full((n,), self.n_classes, device=self.embedding.weight.device)}


class TextCondition(nn.Module):
    """A small transformer over the bytes of a text, trained jointly with the network; no text is the empty one.

    Args:
        dim: its width, a multiple of 32, the width of a head.
        n_layers: transformer blocks.
        length: tokens per text, one more than the bytes that are read.
        c_time: width of the time embedding.
    """

    def __init__(self, dim: int, n_layers: int, length: int, c_time: int) -> None:
        super().__init__()
        self.dim, self.length = dim, length
        self.token = nn.Embedding(N_TOKENS, dim)
        self.position = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(TextBlock(dim, max(1, dim // 32)) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.pool = linear(dim, c_time)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [B, length] int64 -> emb [B, c_time] of the start token, context [B, length, dim] and presence."""
        present = tokens != PAD
        h = self.token(tokens) + self.position
        for block in self.blocks:
            h = block(h, present)
        h = self.norm(h)
        return {"emb": self.pool(h[:, 0]), "context": h, "presence": present.to(h.dtype)}

    def null(self, n: int) -> dict[str, Tensor]:
        """The input that means no condition, n times."""
        return {"tokens": tokenize([""], self.length).to(self.position.device).expand(n, -1)}


class FeatureCondition(nn.Module):
    """What a frozen encoder made of a text, projected; no text is no token but the first, which is learned.

    Args:
        width: channels of the features.
        dim: channels of what cross-attention reads.
        length: features per text, at most.
        c_time: width of the time embedding.
    """

    def __init__(self, width: int, dim: int, length: int, c_time: int) -> None:
        super().__init__()
        self.width, self.dim, self.length = width, dim, length
        self.start = nn.Parameter(0.02 * torch.randn(1, dim))
        self.norm, self.proj, self.pool = nn.LayerNorm(width), linear(width, dim), linear(dim, c_time)

    def forward(self, features: Tensor, present: Tensor) -> dict[str, Tensor]:
        """features [B, length, width], present [B, length] bool -> emb [B, c_time] of the mean over those present,
        context [B, 1 + length, dim] and presence."""
        h = self.proj(self.norm(features))
        presence = present.to(h.dtype)
        mean = (h * presence[..., None]).sum(1) / presence.sum(1, keepdim=True).clamp(min=1)
        start = self.start.to(h.dtype).expand(len(h), 1, -1)
        presence = torch.cat([torch.ones_like(presence[:, :1]), presence], dim=1)
        return {"emb": self.pool(start[:, 0] + mean), "context": torch.cat([start, h], dim=1), "presence": presence}

    def null(self, n: int) -> dict[str, Tensor]:
        """The input that means no condition, n times."""
        features = torch.zeros(n, self.length, self.width, device=self.start.device)
        return {"features": features, "present": torch.zeros_like(features[..., 0], dtype=torch.bool)}


class TextBlock(nn.Module):
    """Pre-norm self-attention over the tokens that are present, then a feed-forward layer of four times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = linear(dim, 3 * dim), linear(dim, dim)
        self.up, self.down = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, h: Tensor, present: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).chunk(3, dim=-1)
        h = h + self.proj(attend(q, k, v, self.heads, present[:, None, None]))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class CrossAttention(nn.Module):
    """Residual block in which pixels look at a text, then a gated feed-forward layer (GEGLU; Shazeer 2020).

    The projection out starts at almost zero, so that a network begins as if there were no text.
    """

    def __init__(self, channels: int, c_context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(groups, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.q, self.kv = linear(channels, channels), linear(c_context, 2 * channels)
        self.proj = linear(channels, channels)
        self.up, self.down = linear(channels, 4 * channels), linear(2 * channels, channels)
        self.proj_out = conv(channels, channels, 1, scale=0)

    def forward(self, x: Tensor, context: Tensor, presence: Tensor) -> Tensor:
        """x [B, C, H, W], context [B, L, D], presence [B, L] in [0, 1] -> [B, C, H, W].

        A token of presence p has p times the weight that its match alone would give it.
        """
        batch, channels, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)
        k, v = self.kv(context).chunk(2, dim=-1)
        q = self.q(self.norm1(h))
        h = h + self.proj(attend(q, k, v, self.heads, presence.log().to(q.dtype)[:, None, None]))
        value, gate = self.up(self.norm2(h)).chunk(2, dim=-1)
        h = h + self.down(value * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).reshape(batch, channels, height, width))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor) -> Tensor:
    """q [B, M, C], k and v [B, L, C] -> [B, M, C]: softmax attention, C / heads channels a head; mask [B, 1, 1, L]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def build_condition(options, c_time: int) -> nn.Module | None:
    """The condition that `options` (the config's model section) describes; None where there is none.

    A class needs `classes`, a text text_dim, text_layers and text_length; with text_encoder, which is not looked for
    here, also text_encoder_width.

    Raises:
        ValueError: an unknown kind of condition, or one of classes without any.
    """
    kind = getattr(options, "condition", "none")
    if kind == "none":
        return None
    if kind == "class":
        if not options.classes:
            raise ValueError("model.condition = class needs model.classes, the names of the classes")
        return ClassCondition(len(options.classes), c_time)
    if kind == "text" and getattr(options, "text_encoder", None) is not None:
        if options.text_encoder_width is None:
            raise ValueError("model.text_encoder needs model.text_encoder_width, the channels of its features")
        return FeatureCondition(options.text_encoder_width, options.text_dim, options.text_length, c_time)
    if kind == "text":
        return TextCondition(options.text_dim, options.text_layers, options.text_length, c_time)
    raise ValueError(f"unknown condition {kind!r}; the conditions are none, class, text")
