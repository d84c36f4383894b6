"""Efficient attention: two softmaxes instead of one (Shen et al. 2018, arXiv 1812.01243, eq. 3).

    E(Q, K, V) = ρ_q(Q) (ρ_k(K)ᵀ V)

ρ_q is a softmax over each query's channels; ρ_k is a softmax over positions, of each key channel by itself. A causal
form can only normalise over the positions read so far, so ρ_k depends on the reader i:

    o_i = Σ_f softmax(q_i)_f · Σ_{j≤i} exp(k_jf) v_j / Σ_{j≤i} exp(k_jf)

Each channel f keeps a running average of the values, weighted by exp(k_f), and the query averages over the channels:
all weights are positive and sum to 1. The paper's bidirectional form is the last row, i = L.
The division is by channel, so it goes into the query: o_i = S_iᵀ (softmax(q_i) / z_i), with z_i the state's last column
once each value has a 1 appended. Key logits are limited to ± 30 so that float32 holds every sum of their exponentials.
"""

from collections.abc import Sequence

from torch import Tensor

from models.language.config import LanguageConfig
from models.language.kernel_attention import KernelAttention
from models.language.linear_attention import chunked, step

LARGEST_LOGIT = 30.0


class EfficientAttention(KernelAttention):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config, config.head_dim)

    def query_features(self, q_THC: Tensor) -> Tensor:
        return q_THC.softmax(-1)

    def key_features(self, k_THC: Tensor) -> Tensor:
        return k_THC.clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()

    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        total = k.cumsum(1)  # z_i, [B, L, H, F]
        if state is not None:
            total = total + state[..., -1][:, None]
        return chunked(q / total, k, v, None, state)  # a padding token has 0 / z, and z > 0 from the tokens before it

    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        return step(q / (state[..., -1] + k), k, v, None, state)

    def finish(self, o_T: Tensor, x_TD: Tensor) -> Tensor:
        return self.o_proj(o_T[..., :-1].to(x_TD.dtype).flatten(-2))
