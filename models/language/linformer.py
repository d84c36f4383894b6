"""Linformer: softmax attention to a few mixtures of positions (Wang et al. 2020, arXiv 2006.04768, eq. 7).

    softmax(Q (E K)ᵀ / √C) (F V)        E, F [P, L]: learned mixtures over positions, shared by the heads

O(L · P) time and memory. Every mixture reads every position, so it cannot be causal; it serves encoders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinformerAttention(nn.Module):
    """Bidirectional self-attention over sequences of at most `max_len` tokens."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, max_len: int, projected_len: int) -> None:
        super().__init__()
        self.head_dim, self.max_len = head_dim, max_len
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size)
        self.key_mixture = nn.Parameter(torch.randn(projected_len, max_len) / max_len**0.5)  # E
        self.value_mixture = nn.Parameter(torch.randn(projected_len, max_len) / max_len**0.5)  # F

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]. Raises ValueError for sequences longer than `max_len`."""
        length = x_BLD.shape[1]
        if length > self.max_len:
            raise ValueError(f"this layer mixes at most {self.max_len} positions, and the input has {length}")
        k_BPD = self.key_mixture[:, :length] @ self.k_proj(x_BLD)
        v_BPD = self.value_mixture[:, :length] @ self.v_proj(x_BLD)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (self.q_proj(x_BLD), k_BPD, v_BPD))
        o_BHLC = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(o_BHLC.transpose(1, 2).flatten(-2))
