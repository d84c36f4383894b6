"""Gated decay linear attention: attention without softmax, whose memory is a matrix of fixed size.

    S_t = g_t S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t / √C        g_t = exp(log_g_t) in (0, 1)

Each head forgets by a scalar that depends on the token, as in Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, §6) and with
the linear attention of Katharopoulos et al. (2020, arXiv 2006.16236) at g = 1. The chunked form is that of gated linear
attention (Yang et al. 2024, arXiv 2312.06635, §4). All three forms give the same numbers:

    parallel    O(L²) time; the definition, and the tests' reference
    chunked     O(L · chunk) time; training and prefill
    recurrent   O(1) time and memory for each token; decoding

They compute in float32 and only exponentiate sums of log-decays, which are never positive, so nothing overflows. The
sums are float64: the decay between two tokens is a difference of two sums that may both be long.
A token with k = 0 and log_g = 0 leaves the state as it is: zero padding needs no mask.

Shapes: q, k, v [B, L, H, C]; log_g [B, L, H] (≤ 0); state [B, H, Ck, Cv]; output [B, L, H, C] and the last state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.cache import StateCache
from models.language.config import LanguageConfig
from models.language.norm import RMSNorm
from models.language.packing import Packing

CHUNK = 64


def parallel(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every pair of tokens at once, token i reading token j ≤ i through the decays in between."""
    q, k, v = q.float(), k.float(), v.float()
    decay = log_g.double().cumsum(1).transpose(1, 2)  # [B, H, L]
    between = _between(decay)
    o = torch.einsum("bihc,bjhc,bhij,bjhd->bihd", q, k, between, v)
    last = torch.einsum("bjhc,bhj,bjhd->bhcd", k, between[:, :, -1], v)
    if state is not None:
        o = o + torch.einsum("bihc,bhi,bhcd->bihd", q, decay.float().exp(), state)
        last = last + decay[..., -1].float().exp()[..., None, None] * state
    return o / math.sqrt(q.shape[-1]), last


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Pairs within a chunk at once; from chunk to chunk only the state is handed on."""
    length = q.shape[1]
    chunk = min(chunk, length)
    q, k, v, log_g = (_split(x.float(), chunk) for x in (q, k, v, log_g[..., None]))  # [B, H, N, chunk, ·]
    decay = log_g.squeeze(-1).double().cumsum(-1)  # log of the decay from the chunk's start through each token
    between = _between(decay)
    within = (q @ k.mT * between) @ v

    from_start = decay.float().exp()[..., None]
    written = (k * between[..., -1, :, None]).mT @ v  # what each chunk adds to the state: [B, H, N, C, C]
    kept = from_start[..., -1:, :]
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    before = []
    for n in range(written.shape[2]):
        before.append(state)
        state = kept[:, :, n] * state + written[:, :, n]
    o = (within + (q * from_start) @ torch.stack(before, 2)) / math.sqrt(q.shape[-1])
    return o.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def recurrent(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token after another."""
    batch, length, heads, size = k.shape
    if state is None:
        state = torch.zeros(batch, heads, size, v.shape[-1], device=q.device)
    outputs = []
    for t in range(length):
        o, state = step(q[:, t], k[:, t], v[:, t], log_g[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def step(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: q, k, v [B, H, C], log_g [B, H] → output [B, H, C] and the new state."""
    q, k, v = q.float(), k.float(), v.float()
    state = log_g.float().exp()[..., None, None] * state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2) / math.sqrt(q.shape[-1]), state


def _between(decay: Tensor) -> Tensor:
    """The decay from token j to token i at [..., i, j], 0 for j > i; from cumulative log-decays [..., L]."""
    future = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).triu(1)
    return (decay[..., :, None] - decay[..., None, :]).float().masked_fill(future, -math.inf).exp()


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, L, H, C] → [B, H, N, chunk, C], zero-padded to whole chunks."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).unflatten(2, (-1, chunk))


class Decay(nn.Module):
    """The log-decay of each head: log g = −softplus(W x + b), computed in float32, [T, H]."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(heads))

    @staticmethod
    def initial_bias(heads: int) -> Tensor:
        """With W = 0, heads remember from 10 to 1000 tokens: g from 0.9 to 0.999, 1 − g evenly spaced in logarithm."""
        forget = torch.logspace(-1, -3, heads, dtype=torch.float64, device="cpu")
        return torch.logit(forget).float()

    def forward(self, x_TD: Tensor) -> Tensor:
        return -F.softplus(F.linear(x_TD.float(), self.weight.float(), self.bias.float()))


class LinearAttention(nn.Module):
    """Query and key pass SiLU and are scaled to length 1; the output passes a norm for each head and a SiLU gate."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        size = self.heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, size, bias=False)  # output gate
        self.decay = Decay(config.hidden_size, self.heads)
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def empty_cache(self, batch: int, max_len: int) -> StateCache:
        return StateCache(batch, self.heads, self.head_dim, self.q_proj.weight.device)

    def forward(
        self, x_TD: Tensor, packing: Packing, cos_sin: tuple[Tensor, Tensor], cache: StateCache | None
    ) -> Tensor:
        q, k, v = (proj(x_TD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = features(q), features(k)
        log_g = self.decay(x_TD)
        state = None if cache is None else cache.state
        if state is not None and packing.max_len == 1:
            o_THC, state = step(q, k, v, log_g, state)
        else:
            o_BLHC, state = chunked(packing.pad(q), packing.pad(k), packing.pad(v), packing.pad(log_g), state)
            o_THC = packing.unpad(o_BLHC)
        if cache is not None:
            cache.state = state
        return self.o_proj(gated_norm(o_THC.to(x_TD.dtype), self.o_norm, self.g_proj(x_TD)))


def features(x_THC: Tensor) -> Tensor:
    """The feature map of queries and keys: SiLU, then unit length."""
    return F.normalize(F.silu(x_THC.float()), dim=-1)


def gated_norm(o_THC: Tensor, norm: nn.Module, gate: Tensor) -> Tensor:
    """RMSNorm of each head, times the SiLU of the gate, [T, H * C]."""
    return norm(o_THC).flatten(-2) * F.silu(gate)
