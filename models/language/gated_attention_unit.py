"""FLASH: the gated attention unit with mixed chunk attention (Hua et al. 2022, arXiv 2202.10447, §3.2 and §4).

    U = SiLU(X W_u)   V = SiLU(X W_v)   Z = SiLU(X W_z)   O = (U ∘ V̂) W_o

Attention inside a gated linear unit, with one head: a layer of this kind has no MLP of its own, because U, V and W_o
are one. With e = `intermediate_size` it holds the parameters of a SwiGLU MLP plus D · s for Z, s = `head_dim`. In the
paper e = 2 D, and two such layers stand in for one of attention and MLP.

V̂ is the sum of two attentions, both without softmax. Their queries and keys are all the same Z with a scale and offset
for each channel, and a rotary embedding. Sequences are cut into chunks of c tokens from their beginning:

    within a chunk    relu²(q_i · k_j / c) v_j over j ≤ i in i's chunk               quadratic in c
    across chunks     q'_i · Σ_j k'_j v_jᵀ / c over all j in earlier chunks           linear in L

The paper's relative position bias is left out: the rotary embedding tells positions.

The state of a sequence is what the finished chunks wrote, [s, e], and the unfinished chunk's k, k' and v, c · (2 s + e)
numbers; how many of its c rows are filled follows from the position.

Shapes: S = s, E = e; q, k, q', k' [B, L, S]; v [B, L, E]; output [B, L, E].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.config import LanguageConfig
from models.language.recurrent import RecurrentMixer, Rotation
from models.language.rope import rotate


def parallel(q: Tensor, k: Tensor, q_far: Tensor, k_far: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Every pair of tokens at once: the definition, and the tests' reference."""
    chunk_L = torch.arange(q.shape[1], device=q.device) // chunk
    same = (chunk_L[:, None] == chunk_L).tril()
    earlier = chunk_L[:, None] > chunk_L
    weights = F.relu(q @ k.mT / chunk).square() * same + q_far @ k_far.mT / chunk * earlier
    return weights @ v


def chunked(
    q: Tensor, k: Tensor, q_far: Tensor, k_far: Tensor, v: Tensor, far: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Sequences that begin where a chunk begins. `far` [B, S, E]: what earlier chunks wrote. Returns the output, and
    what has been written before each chunk and after the last, float32 [B, N + 1, S, E]. Products take the dtype of
    their inputs."""
    length = q.shape[1]
    q, k, q_far, k_far, v = (
        F.pad(x, (0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)) for x in (q, k, q_far, k_far, v)
    )
    near = F.relu((q @ k.mT).float() / chunk).square().tril().to(v.dtype) @ v
    written = (k_far.mT @ v).float() / chunk
    if far is None:
        far = torch.zeros_like(written[:, 0])
    before = torch.cat([far[:, None], written], 1).cumsum(1)
    return (near + q_far @ before[:, :-1].to(v.dtype)).flatten(1, 2)[:, :length], before


class GatedAttentionUnit(RecurrentMixer):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        hidden, inner, self.size = config.hidden_size, config.intermediate_size, config.head_dim
        self.inner, self.chunk = inner, config.gau_chunk_size
        self.state_shape = (self.size * inner + self.chunk * (2 * self.size + inner),)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)  # U
        self.up_proj = nn.Linear(hidden, inner, bias=False)  # V
        self.z_proj = nn.Linear(hidden, self.size, bias=False)
        self.scale = nn.Parameter(torch.empty(4, self.size))  # of q, k, q' and k'
        self.offset = nn.Parameter(torch.empty(4 * self.size))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        self.scale.fill_(1.0)  # the paper's 0.02 makes products of a query and a key vanish at first
        self.offset.zero_()

    def project(self, x_TD: Tensor, cos_sin: Rotation, positions_T: Tensor) -> tuple[Tensor, ...]:
        z_TS = F.silu(self.z_proj(x_TD))
        z_T4S = z_TS[:, None] * self.scale + self.offset.view_as(self.scale)
        q, k, q_far, k_far = rotate(z_T4S, *cos_sin).unbind(1)
        valid_T = torch.ones_like(positions_T)
        return q, k, q_far, k_far, F.silu(self.up_proj(x_TD)), positions_T, valid_T

    def finish(self, o_T: Tensor, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * o_T.to(x_TD.dtype))

    def mix(self, inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        *tensors, positions_BL, valid_BL = inputs
        length, chunk = positions_BL.shape[1], self.chunk
        ends_B = filled_B = valid_BL.sum(1)
        far = None
        if state is not None:
            # Put the unfinished chunk's tokens in front, so that every sequence begins where a chunk does.
            far, *buffers = self.unpack(state)
            k_old, k_far_old, v_old = (x.to(tensors[0].dtype) for x in buffers)  # they came from this dtype
            filled_B = positions_BL[:, 0] % chunk
            ends_B = ends_B + filled_B
            old = [torch.zeros_like(k_old), k_old, torch.zeros_like(k_old), k_far_old, v_old]
            source = torch.arange(chunk + length, device=filled_B.device) - filled_B[:, None]  # < 0: from the state
            source = torch.where(source < 0, source + filled_B[:, None], source + chunk)  # in [old, new]
            source = source.clamp(max=chunk + length)  # and a row of zeros at the very end
            tensors = [_take(F.pad(torch.cat([o, x], 1), (0, 0, 0, 1)), source) for o, x in zip(old, tensors)]
        q, k, q_far, k_far, v = tensors
        o, before = chunked(q, k, q_far, k_far, v, far, chunk)
        if state is not None:
            o = _take(o, torch.arange(length, device=o.device) + filled_B[:, None])
        # What is left in the last chunk, empty if it is full, and what the full chunks have written.
        full_B = ends_B // chunk
        rest = torch.arange(chunk, device=o.device) + (full_B * chunk)[:, None]
        filled = (rest < ends_B[:, None])[..., None]
        buffers = [_take(x, rest.clamp(max=x.shape[1] - 1)) * filled for x in (k, k_far, v)]
        far = before[torch.arange(len(full_B), device=o.device), full_B]
        return o, torch.cat([x.flatten(1).float() for x in (far, *buffers)], 1)

    def step(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, positions_B, _ = inputs
        q, k_new, q_far, k_far_new, v_new = (x.float() for x in tensors)
        far, k, k_far, v = self.unpack(state)
        here = torch.arange(self.chunk, device=q.device) == (positions_B % self.chunk)[:, None]  # the token's own row
        k, k_far, v = (
            torch.where(here[..., None], new[:, None], old) for new, old in ((k_new, k), (k_far_new, k_far), (v_new, v))
        )
        near = F.relu(torch.einsum("bs,bcs->bc", q, k) / self.chunk).square()  # empty rows have k = 0
        o = torch.einsum("bc,bce->be", near, v) + torch.einsum("bs,bse->be", q_far, far)
        ends = here[:, -1, None, None]  # the chunk is full: it is written, and the next one is empty
        far = torch.where(ends, far + k_far.mT @ v / self.chunk, far)
        buffers = [x.masked_fill(ends, 0.0) for x in (k, k_far, v)]
        return o, torch.cat([x.flatten(1) for x in (far, *buffers)], 1)

    def unpack(self, state: Tensor) -> tuple[Tensor, ...]:
        """What the finished chunks wrote [B, S, E], and the unfinished chunk's k, k' [B, c, S] and v [B, c, E]."""
        size, inner, chunk = self.size, self.inner, self.chunk
        parts = state.split([size * inner, chunk * size, chunk * size, chunk * inner], 1)
        widths = (inner, size, size, inner)
        return tuple(part.unflatten(1, (-1, width)) for part, width in zip(parts, widths))


def _take(x_BLE: Tensor, rows_BM: Tensor) -> Tensor:
    """Rows of each sequence, [B, M, E]."""
    return x_BLE.gather(1, rows_BM[..., None].expand(-1, -1, x_BLE.shape[-1]))
