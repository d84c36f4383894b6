"""Nyströmformer: softmax attention through landmarks (Xiong et al. 2021, arXiv 2102.03902, eq. 13 and 14).

    softmax(Q K̃ᵀ/√C) · softmax(Q̃ K̃ᵀ/√C)⁺ · softmax(Q̃ Kᵀ/√C) V

Q̃ and K̃ are M landmarks: means over L / M neighbouring positions. The pseudo-inverse A⁺ is an iteration. O(L · M) time
and memory. Every landmark reads later positions, so it cannot be causal; it serves encoders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NystromformerAttention(nn.Module):
    """Bidirectional self-attention; `convolution` > 0 adds a depthwise convolution of that (odd) width over the values
    (§3.3, "skip connection")."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, landmarks: int, convolution: int = 33) -> None:
        super().__init__()
        self.head_dim, self.landmarks = head_dim, landmarks
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size)
        self.value_conv = (
            nn.Conv2d(heads, heads, (convolution, 1), padding=(convolution // 2, 0), groups=heads, bias=False)
            if convolution
            else None
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]. A length that the landmarks do not divide is filled up with zeros in front."""
        length = x_BLD.shape[1]
        x_BLD = F.pad(x_BLD, (0, 0, -length % self.landmarks, 0))
        q, k, v = (
            proj(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        o_BHLC = nystrom_attention(q, k, v, self.landmarks)
        if self.value_conv is not None:
            o_BHLC = o_BHLC + self.value_conv(v)
        return self.o_proj(o_BHLC.transpose(1, 2).flatten(-2)[:, -length:])


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """q, k, v [B, H, L, C] with L a multiple of `landmarks` → [B, H, L, C]."""
    q = q * q.shape[-1] ** -0.5
    q_mark, k_mark = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (q, k))
    left = (q @ k_mark.mT).softmax(-1)
    middle = (q_mark @ k_mark.mT).softmax(-1)
    right = (q_mark @ k.mT).softmax(-1)
    return left @ pseudo_inverse(middle) @ (right @ v)


def pseudo_inverse(a: Tensor, iterations: int = 6) -> Tensor:
    """Moore–Penrose inverse of square matrices by a third-order Newton iteration (eq. 11 and Razavi et al. 2014). It
    starts from aᵀ over the largest row and column sums of the whole batch."""
    z = a.mT / (a.abs().sum(-2).max() * a.abs().sum(-1).max())
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z
