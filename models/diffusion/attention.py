"""The attentive half: self-attention over pixels, cross-attention to the text (Rombach et al. 2022, section 3.3).

Shapes: B images, C channels, H × W pixels, L = H·W query positions, M context positions (text tokens), D width of the
context, N heads, K width of a head. Parameter names are those of diffusers.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def attention(q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √K) V of each head, (B, L, C)."""
    q_BNLK, k_BNMK, v_BNMK = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q_BLC, k_BMC, v_BMC))
    return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK).transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """Attention with Q from x and K, V from the context.

    qkv_bias: the autoencoder's projections have a bias, the UNet's have none.
    """

    def __init__(self, width: int, context_width: int, heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k: nn.Module = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v: nn.Module = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def attend(self, x_BLC: Tensor, context_BMD: Tensor) -> Tensor:
        return self.to_out[0](attention(self.to_q(x_BLC), self.to_k(context_BMD), self.to_v(context_BMD), self.heads))


class Attention(Projections):
    """The UNet's attention: to the context, or to x itself if there is none."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__(width, context_width, heads, qkv_bias=False)

    def forward(self, x_BLC: Tensor, context_BMD: Tensor | None = None) -> Tensor:
        return self.attend(x_BLC, x_BLC if context_BMD is None else context_BMD)


class PixelAttention(Projections):
    """The autoencoder's single-head self-attention over all pixels, with its own norm and skip connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BLC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        return x_BCHW + self.attend(x_BLC, x_BLC).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class GEGLU(nn.Module):
    """a · gelu(b), with a and b linear in x (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x_BLC: Tensor) -> Tensor:
        value, gate = self.proj(x_BLC).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.net(x_BLC)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each after a layer norm and beside a skip."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1: nn.Module = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2: nn.Module = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x_BLC: Tensor, context_BMD: Tensor) -> Tensor:
        x_BLC = x_BLC + self.attn1(self.norm1(x_BLC))
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), context_BMD)
        return x_BLC + self.ff(self.norm3(x_BLC))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, between two 1 × 1 convolutions."""

    def __init__(self, channels: int, context_width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, context_BMD: Tensor) -> Tensor:
        y_BCHW = self.proj_in(self.norm(x_BCHW))
        y_BLC = self.transformer_blocks[0](y_BCHW.flatten(2).transpose(1, 2), context_BMD)
        return x_BCHW + self.proj_out(y_BLC.transpose(1, 2).unflatten(2, x_BCHW.shape[-2:]))
