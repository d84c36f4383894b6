"""The panoptic head (arXiv 2005.12872, section 4.4): a mask for each query, from where the query attends.

B images, Q queries, N heads, C channels; names of parameters as in the published checkpoints.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionMap(nn.Module):
    """The softmax of an attention over the whole feature map, all heads together, without values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query_BQD: Tensor, memory_BKD: Tensor, valid_BK: Tensor | None) -> Tensor:
        """Returns weights (B, Q, N, K) that sum to 1 over N·K."""
        q = self.q_linear(query_BQD).unflatten(-1, (self.heads, -1))
        k = self.k_linear(memory_BKD).unflatten(-1, (self.heads, -1))
        weights_BQNK = torch.einsum("bqnd,bknd->bqnk", q * q.shape[-1] ** -0.5, k)
        if valid_BK is not None:
            weights_BQNK = weights_BQNK.masked_fill(~valid_BK[:, None, None], -torch.inf)
        return weights_BQNK.flatten(2).softmax(-1).view_as(weights_BQNK)


class MaskHead(nn.Module):
    """Convolutions with group norm that bring the attention maps up to stride 4, FPN style.

    Everything before the first sum with a finer feature map is done a query; `adapter` runs once an image.
    """

    def __init__(self, dim: int, heads: int, finer_channels: Sequence[int]) -> None:
        """finer_channels: of the three feature maps from coarse to fine."""
        super().__init__()
        widths = [dim + heads, dim + heads, dim // 2, dim // 4, dim // 8, dim // 16]
        self.lay1: nn.Conv2d
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.add_module(f"lay{i}", nn.Conv2d(inputs, outputs, 3, padding=1))
            self.add_module(f"gn{i}", nn.GroupNorm(min(8, outputs), outputs))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for i, channels in enumerate(finer_channels, start=1):
            self.add_module(f"adapter{i}", nn.Conv2d(channels, widths[i + 1], 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # Attention sums to 1 over all heads and cells, so it is hundreds of times smaller than the features beside it,
        # and is all that tells one query's mask from another's. Random weights that read it begin larger.
        with torch.no_grad():
            self.lay1.weight[:, dim:] *= 64

    def forward(self, x_BCHW: Tensor, attention_BQNHW: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """finer: feature maps from coarse to fine. Returns mask logits (B, Q, h, w) of the finest map's size."""
        queries = attention_BQNHW.shape[1]
        x = torch.cat([_repeat(x_BCHW, queries), attention_BQNHW.flatten(0, 1)], 1)
        x = self._convolve(2, self._convolve(1, x))
        for i, features_BCHW in enumerate(finer, start=1):
            detail = getattr(self, f"adapter{i}")(features_BCHW)
            x = _repeat(detail, queries) + F.interpolate(x, size=detail.shape[-2:], mode="nearest")
            x = self._convolve(i + 2, x)
        return self.out_lay(x).squeeze(1).unflatten(0, (-1, queries))

    def _convolve(self, i: int, x: Tensor) -> Tensor:
        return F.relu(getattr(self, f"gn{i}")(getattr(self, f"lay{i}")(x)))


def _repeat(x_BCHW: Tensor, times: int) -> Tensor:
    return x_BCHW[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1)
