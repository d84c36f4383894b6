"""Linear attention: attention without softmax, whose memory is a matrix of fixed size.

    S_t = g_t S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t        g_t = exp(log_g_t) in (0, 1]

This operator is what most kinds share. With g = 1 it is that of Katharopoulos et al. (2020, arXiv 2006.16236, eq.
9–12); with a decay for each head and token that of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, §6). The chunked form is
that of gated linear attention (Yang et al. 2024, arXiv 2312.06635, §4). All three forms give the same numbers:

    parallel    O(L²) time; the definition, and the tests' reference
    chunked     O(L · chunk) time; training and prefill
    recurrent   O(1) time and memory for each token; decoding

They compute in float32 and only exponentiate sums of log-decays, which are never positive, so nothing overflows. The
sums are float64: the decay between two tokens is a difference of two sums that may both be long. On a GPU in half
precision the chunked form runs through Triton kernels instead (linear_attention_kernels.py).
A token with k = 0 and log_g = 0 leaves the state as it is: zero padding needs no mask.

Shapes: q, k [B, L, H, F]; v [B, L, H, C]; log_g [B, L, H] (≤ 0; None: no decay); state [B, H, F, C]; output
[B, L, H, C] and the last state. F and C are equal unless a feature map changes F or a normaliser widens C.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.norm import RMSNorm
from models.language.recurrent import RecurrentMixer, Rotation

CHUNK = 64
GROUP = 32  # chunks whose states are found together


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every pair of tokens at once, token i reading token j ≤ i through the decays in between."""
    q, k, v = q.float(), k.float(), v.float()
    decay = torch.zeros(q.shape[:3]) if log_g is None else log_g
    decay = decay.to(q.device, torch.float64).cumsum(1).transpose(1, 2)  # [B, H, L]
    between = decay_between(decay)
    o = torch.einsum("bihf,bjhf,bhij,bjhc->bihc", q, k, between, v)
    last = torch.einsum("bjhf,bhj,bjhc->bhfc", k, between[:, :, -1], v)
    if state is not None:
        o = o + torch.einsum("bihf,bhi,bhfc->bihc", q, decay.float().exp(), state)
        last = last + decay[..., -1].float().exp()[..., None, None] * state
    return o, last


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Pairs within a chunk at once; from chunk to chunk only the state is handed on."""
    if (kernels := kernels_for(q, v)) is not None:
        return kernels.chunked(q, k, v, log_g, state, chunk)
    length = q.shape[1]
    chunk = min(chunk, length)
    q, k, v = (split(x.float(), chunk) for x in (q, k, v))  # [B, H, N, chunk, ·]
    scores = q @ k.mT
    if log_g is None:
        scores, decay = scores.tril(), None
    else:
        # the log of the decay from the chunk's start through each token, [B, H, N, chunk]
        decay = split(log_g[..., None], chunk).squeeze(-1).double().cumsum(-1)
        between = decay_between(decay)
        scores = scores * between
        q, k = q * decay.float().exp()[..., None], k * between[..., -1, :, None]
    within = scores @ v
    before, last = scan(None if decay is None else decay[..., -1], k.mT @ v, state)
    return join(within + q @ before, length), last


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after another."""
    if state is None:
        state = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], device=q.device)
    outputs = []
    for t in range(q.shape[1]):
        o, state = step(q[:, t], k[:, t], v[:, t], None if log_g is None else log_g[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def step(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: q, k [B, H, F], v [B, H, C], log_g [B, H] → output [B, H, C] and the new state."""
    q, k, v = q.float(), k.float(), v.float()
    if log_g is not None:
        state = log_g.float().exp()[..., None, None] * state
    state = state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def scan(log_kept: Tensor | None, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each of N chunks, [B, H, N, F, C], and after the last, when each keeps exp(log_kept) of the
    state, [B, H, N], and adds `written`, [B, H, N, F, C].

    No loop over chunks: inside a group of chunks all pairs at once, and the groups are a shorter scan of the same kind.
    """
    chunks, shape = written.shape[2], written.shape[3:]
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    if log_kept is None:
        log_kept = written.new_zeros(written.shape[:3], dtype=torch.float64)
    if chunks <= GROUP:
        states = torch.cat([state[:, :, None], written], 2).flatten(3)
        after = decay_between(F.pad(log_kept.cumsum(2), (1, 0))) @ states
        after = after.unflatten(3, shape)
        return after[:, :, :-1], after[:, :, -1]
    padding = -chunks % GROUP
    grouped = F.pad(written, (0, 0, 0, 0, 0, padding)).unflatten(2, (-1, GROUP))
    decay = F.pad(log_kept, (0, padding)).unflatten(2, (-1, GROUP)).cumsum(3)  # [B, H, M, GROUP]
    after = (decay_between(decay) @ grouped.flatten(4)).unflatten(4, shape)  # by the group's own chunks
    start, last = scan(decay[..., -1], after[:, :, :, -1], state)
    before = F.pad(after[:, :, :, :-1], (0, 0, 0, 0, 1, 0))
    kept = F.pad(decay[..., :-1], (1, 0)).float().exp()
    before = before + kept[..., None, None] * start[:, :, :, None]
    return before.flatten(2, 3)[:, :, :chunks], last


def kernels_for(q: Tensor, v: Tensor) -> ModuleType | None:
    """The Triton kernels, where they serve: half precision on an NVIDIA GPU, and widths that are powers of two."""
    if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16):
        return None
    from models.language import linear_attention_kernels  # triton comes with torch's CUDA builds only

    fits = q.shape[-1] in linear_attention_kernels.WIDTHS and v.shape[-1] in linear_attention_kernels.WIDTHS
    return linear_attention_kernels if fits else None


def decay_between(decay: Tensor) -> Tensor:
    """The decay from token j to token i at [..., i, j], 0 for j > i; from cumulative log-decays [..., L]."""
    future = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).triu(1)
    return (decay[..., :, None] - decay[..., None, :]).float().masked_fill(future, -math.inf).exp()


def split(x: Tensor, chunk: int) -> Tensor:
    """[B, L, H, C] → [B, H, N, chunk, C], zero-padded to whole chunks."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.transpose(1, 2).unflatten(2, (-1, chunk))


def join(x: Tensor, length: int) -> Tensor:
    """The inverse of `split`: [B, H, N, chunk, C] → [B, L, H, C]."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)


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

    def initialise(self, generator: torch.Generator) -> None:
        self.bias.copy_(self.initial_bias(self.bias.numel()))

    def forward(self, x_TD: Tensor) -> Tensor:
        return -F.softplus(F.linear(x_TD.float(), self.weight.float(), self.bias.float()))


class LinearAttention(RecurrentMixer):
    """Gated decay. Query and key pass SiLU and are scaled to length 1, the query also by 1/√C; the output passes a norm
    for each head and a SiLU gate."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.state_shape = (self.heads, self.head_dim, self.head_dim)
        size = self.heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, size, bias=False)  # output gate
        self.decay = Decay(config.hidden_size, self.heads)
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def project(self, x_TD: Tensor, cos_sin: Rotation, positions_T: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (proj(x_TD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return features(q) / math.sqrt(self.head_dim), features(k), v, self.decay(x_TD)

    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_g = inputs
        return chunked(q, k, v, log_g, state)

    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_g = inputs
        return step(q, k, v, log_g, state)

    def finish(self, o_T: Tensor, x_TD: Tensor) -> Tensor:
        gated_THC = self.o_norm(o_T.to(x_TD.dtype)).flatten(-2) * F.silu(self.g_proj(x_TD))
        return self.o_proj(gated_THC)


def features(x_THC: Tensor) -> Tensor:
    """The feature map of queries and keys: SiLU, then unit length."""
    return F.normalize(F.silu(x_THC.float()), dim=-1)
