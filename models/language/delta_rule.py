"""Gated delta rule: a memory that replaces what it holds under a key instead of adding to it.

    S_t = g_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t        β_t in (0, 1), ‖k_t‖ = 1

Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, eq. 10); with g = 1 DeltaNet (arXiv 2406.06484). Within a chunk the
products of (I − β k kᵀ) collapse into the WY form (eq. 8–9 there): u solves a unit lower triangular system

    (I + tril(diag(β) K Kᵀ ∘ Γ, −1)) [U, W] = diag(β) [V, K ∘ γ]

with γ_i the decay from the chunk's start and Γ_ij = γ_i / γ_j, after which the chunk writes Kᵀ(U − W S) where plain
linear attention writes KᵀV. The parallel form is one chunk.
The paper's layer also has short convolutions before the features; ours has none, so its state is the matrix alone.

Shapes and number formats are those of linear_attention.py; beta [B, L, H] like log_g.
On a GPU in half precision the chunked form is flash-linear-attention's Triton kernel if that package is installed (the
extra `fla`), which has the triangular systems in a kernel too, or else goes from chunk to chunk in a kernel of ours
(delta_rule_kernels.py). On Hopper GPUs Triton 3.4 to 3.7.0 compiles that package's backward pass to wrong code (its
issue 640: `chunk_bwd_kernel_dqkwg`, gradients of k, log_g and beta); ours serves those.
A token with k = 0, β = 0 and log_g = 0 leaves the state as it is.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.linear_attention import CHUNK, LinearAttention, decay_between, join, kernels_for, split
from models.language.recurrent import Rotation

GROUP = 32  # chunks whose transitions are multiplied together
BLOCK = 16  # rows that are solved one after another in a triangular system


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every pair of tokens at once."""
    return chunked_in_torch(q, k, v, log_g, beta, state, q.shape[1])


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Pairs within a chunk at once; from chunk to chunk only the state is handed on."""
    if kernels_for(q, v) is None:
        return chunked_in_torch(q, k, v, log_g, beta, state, min(chunk, q.shape[1]))
    if (kernel := _fla_kernel()) is not None:
        q, k = q.to(v.dtype), k.to(v.dtype)
        o, last = kernel(q, k, v, log_g, beta, scale=1.0, initial_state=state, output_final_state=True)
        return o, last
    from models.language import delta_rule_kernels  # triton comes with torch's CUDA builds only

    return delta_rule_kernels.chunked(q, k, v, log_g, beta, state, chunk)


@functools.cache
def _fla_kernel() -> Callable[..., Any] | None:
    try:
        import triton
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    if torch.cuda.get_device_capability()[0] == 9 and is_wrong_on_hopper(triton.__version__):
        return None
    return cast(Callable[..., Any], chunk_gated_delta_rule)


def is_wrong_on_hopper(triton_version: str) -> bool:
    """Whether this Triton compiles flash-linear-attention's backward pass to wrong code there."""
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", triton_version)
    return release is not None and (3, 4, 0) <= tuple(map(int, release.groups())) < (3, 7, 1)


def chunked_in_torch(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The chunked form without a kernel: all chunks' triangular systems at once, then a scan over the chunks."""
    length = q.shape[1]
    decay = split(log_g[..., None], chunk).squeeze(-1).double().cumsum(-1)
    between, from_start = decay_between(decay), decay.float().exp()[..., None]
    read, new, k_end = triangular_systems(k, v, decay, between, beta)

    q, k = (split(x.float(), chunk) for x in (q, k))
    k_end = k_end.mT  # [B, H, N, F, chunk]
    kept = from_start[..., -1:, :] * torch.eye(k.shape[-1], device=k.device) - k_end @ read
    before, last = scan(kept, k_end @ new, state)
    o = (q * from_start) @ before + (q @ k.mT * between) @ (new - read @ before)
    return join(o, length), last


def triangular_systems(
    k: Tensor, v: Tensor, decay: Tensor, between: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all chunks W [B, H, N, chunk, F], U [B, H, N, chunk, C], and the keys decayed to the chunk's end, all float32;
    from log-decays summed from the chunk's start, [B, H, N, chunk], and the decays between its tokens."""
    chunk, width = decay.shape[-1], v.shape[-1]
    k, v, beta = (split(x.float(), chunk) for x in (k, v, beta[..., None]))
    inverse = unit_lower_inverse(beta * (k @ k.mT) * between)
    right = torch.cat([beta * v, beta * decay.float().exp()[..., None] * k], -1)
    new, read = (inverse @ right).split([width, k.shape[-1]], -1)
    return read, new, k * between[..., -1, :, None]


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + tril(a, −1))⁻¹ of square matrices [..., n, n]."""
    return _UnitLowerInverse.apply(a)


class _UnitLowerInverse(torch.autograd.Function):
    """Blocks of the diagonal first; then, twice as large at each turn, what lies below them, by products:

        [ A  0 ]⁻¹   [     A⁻¹         0  ]
        [ C  B ]   = [ −B⁻¹ C A⁻¹     B⁻¹ ]

    A solver of triangular systems goes row by row, and so does its backward pass; here that is two products too.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        n = a.shape[-1]
        size = BLOCK if n % BLOCK == 0 and (n // BLOCK).bit_count() == 1 else n
        identity = torch.eye(size, dtype=a.dtype, device=a.device)
        diagonal = _diagonal_blocks(a, size)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False, unitriangular=True)
        while size < n:
            corner = _diagonal_blocks(a, 2 * size)[..., size:, :size]
            top, bottom = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            inverse = F.pad(torch.cat([top, -(bottom @ corner @ top)], -2), (0, size))
            inverse[..., size:, size:] = bottom
            size *= 2
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grads[0] @ inverse.mT).tril(-1)


def _diagonal_blocks(a: Tensor, size: int) -> Tensor:
    """[..., n, n] → [..., n / size, size, size]."""
    tiles = a.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [..., n / size, size, n / size, size]
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def scan(kept: Tensor, written: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each of N chunks, [B, H, N, F, C], and after the last, when chunk n turns S into kept_n S +
    written_n (kept [B, H, N, F, F], written [B, H, N, F, C]).

    2 · GROUP steps rather than N: all groups of chunks advance side by side, each carrying what it does to any state
    that enters it, and then the groups follow one another.
    """
    chunks, size = written.shape[2], written.shape[3]
    if state is None:
        state = torch.zeros_like(written[:, :, 0])
    before = []
    if chunks <= GROUP:
        for n in range(chunks):
            before.append(state)
            state = kept[:, :, n] @ state + written[:, :, n]
        return torch.stack(before, 2), state
    padding = -chunks % GROUP
    identity = torch.eye(size, device=kept.device).expand(*kept.shape[:2], padding, size, size)
    kept = torch.cat([kept, identity], 2).unflatten(2, (-1, GROUP))  # [B, H, M, GROUP, F, F]
    written = torch.cat([written, written.new_zeros(*written.shape[:2], padding, *written.shape[3:])], 2)
    written = written.unflatten(2, (-1, GROUP))
    effect = torch.eye(size, device=kept.device).expand(*kept.shape[:3], size, size)
    effect = torch.cat([effect, torch.zeros_like(written[:, :, :, 0])], -1)  # S ↦ effect[..., :F] S + effect[..., F:]
    for n in range(GROUP):
        before.append(effect)
        keep_n, write_n = kept[:, :, :, n], written[:, :, :, n]
        effect = keep_n @ effect
        effect = torch.cat([effect[..., :size], effect[..., size:] + write_n], -1)
    start, last = scan(effect[..., :size], effect[..., size:], state)
    effects = torch.stack(before, 3)  # [B, H, M, GROUP, F, F + C]
    states = effects[..., :size] @ start[:, :, :, None] + effects[..., size:]
    return states.flatten(2, 3)[:, :, :chunks], last


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after another."""
    if state is None:
        state = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], device=q.device)
    outputs = []
    for t in range(q.shape[1]):
        o, state = step(q[:, t], k[:, t], v[:, t], log_g[:, t], beta[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def step(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: q, k [B, H, F], v [B, H, C], log_g, beta [B, H]."""
    q, k, v = q.float(), k.float(), v.float()
    state = log_g.float().exp()[..., None, None] * state
    held = (k[..., None, :] @ state).squeeze(-2)  # what the memory has under this key
    state = state + k[..., :, None] * (beta.float()[..., None] * (v - held))[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


class GatedDeltaRule(LinearAttention):
    """Gated decay's layer with another memory, and β = sigmoid(W x) for each head, computed in float32."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.b_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def project(self, x_TD: Tensor, cos_sin: Rotation, positions_T: Tensor) -> tuple[Tensor, ...]:
        return *super().project(x_TD, cos_sin, positions_T), self.b_proj(x_TD).float().sigmoid()

    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_g, beta = inputs
        return chunked(q, k, v, log_g, beta, state)

    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_g, beta = inputs
        return step(q, k, v, log_g, beta, state)
