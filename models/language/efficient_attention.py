"""Efficient attention: two softmaxes instead of one (Shen et al. 2018, arXiv 1812.01243, eq. 3).

    E(Q, K, V) = ρ_q(Q) (ρ_k(K)ᵀ V)

ρ_q is a softmax over each query's channels; ρ_k is a softmax over positions, of each key channel by itself. A causal
form can only normalise over the positions read so far, so ρ_k depends on the reader i:

    o_i = Σ_f softmax(q_i)_f · Σ_{j≤i} exp(k_jf) v_j / Σ_{j≤i} exp(k_jf)

Each channel f keeps a running average of the values, weighted by exp(k_f), and the query averages over the channels:
all weights are positive and sum to 1. The paper's bidirectional form is the last row, i = L.
With z_if the denominator, o_i = S_iᵀ (softmax(q_i) / z_i): a linear attention whose queries are divided channel by
channel. Key logits are limited to ± 30 so that float32 holds every sum of their exponentials.
"""

import torch
from torch import Tensor

from models.language.config import LanguageConfig
from models.language.kernel_attention import KernelAttention

LARGEST_LOGIT = 30.0


class EfficientAttention(KernelAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config, config.head_dim)

    def query_features(self, q_THC: Tensor) -> Tensor:
        return q_THC.softmax(-1)

    def key_features(self, k_THC: Tensor) -> Tensor:
        return k_THC.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()

    def normalise(self, q: Tensor, z: Tensor) -> Tensor:
        return q / z.clamp(min=torch.finfo(torch.float32).tiny)
