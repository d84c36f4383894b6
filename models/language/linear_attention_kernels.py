"""Triton kernels for the chunked form of linear attention on a GPU: the same three pieces as in linear_attention.py.

    write   what each chunk adds to the state            W_n = (K ∘ exp(d_end − d))ᵀ V
    scan    the state before each chunk                  S_{n+1} = exp(d_end) S_n + W_n
    read    what each token reads                        o_i = Σ_{j≤i} (q_i·k_j) exp(d_i − d_j) v_j + exp(d_i) S_nᵀ q_i

d is the log-decay summed from the chunk's start. What plain torch writes to memory between its products (scores and
decays, [chunk, chunk] for each chunk and head) stays on the chip here. Products take the dtype of v and sum in float32,
and so does the scan; the states before each chunk and their gradients are kept in the dtype of v, since they are most
of what a long sequence moves. The backward passes are written out, in the opposite order: each reads its inputs again,
recomputes the scores, and adds to what the pass before it found for k, v and d, so that nothing is left for autograd to
add up. Without decay `decay` is None, and the kernels are compiled without it.

The scan is in linear_attention_scan.py. Shapes as in linear_attention.py, F and C powers of two from 16 to 128; decay
float32 [B, H, N, chunk], states [B, H, N, F, C].
"""

# mypy: disallow-untyped-defs=False
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.language import linear_attention_scan

WIDTHS = (16, 32, 64, 128)


@triton.jit
def _tile(base, b, h, t, L, H, offset, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows t, channels offset to offset + WIDTH, of a contiguous [B, L, H, STRIDE]; which rows exist."""
    row = (b * L + t).to(tl.int64) * H + h
    return base + row[:, None] * STRIDE + offset + tl.arange(0, WIDTH)[None, :], (t < L)[:, None]


@triton.jit
def _state(base, chunk, offset, F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """Pointers to columns offset to offset + BC of one chunk's [F, C]."""
    return base + chunk * F * C + tl.arange(0, F)[:, None] * C + offset + tl.arange(0, BC)[None, :]


@triton.jit
def _write_forward(k, v, decay, written, L, H, N, F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    bh, n, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BC
    chunk = bh.to(tl.int64) * N + n
    t = n * BT + tl.arange(0, BT)
    k_at, exists = _tile(k, bh // H, bh % H, t, L, H, 0, F, F)
    v_at, _ = _tile(v, bh // H, bh % H, t, L, H, offset, C, BC)
    v_tile = tl.load(v_at, mask=exists, other=0.0)
    k_end = tl.load(k_at, mask=exists, other=0.0)
    if decay is not None:
        d = tl.load(decay + chunk * BT + tl.arange(0, BT))
        end = tl.load(decay + chunk * BT + BT - 1)
        k_end = (k_end * tl.exp(end - d)[:, None]).to(v_tile.dtype)
    tl.store(_state(written, chunk, offset, F, C, BC), tl.dot(tl.trans(k_end), v_tile, input_precision="ieee"))


@triton.jit
def _write_backward(
    k, v, decay, d_written, d_k, d_v, d_decay, L, H, N,
    F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    bh, n = tl.program_id(0), tl.program_id(1)
    chunk = bh.to(tl.int64) * N + n
    t, i = n * BT + tl.arange(0, BT), tl.arange(0, BT)
    k_at, exists = _tile(k, bh // H, bh % H, t, L, H, 0, F, F)
    k_tile = tl.load(k_at, mask=exists, other=0.0)
    k_end = k_tile
    if decay is not None:
        d = tl.load(decay + chunk * BT + i)
        end = tl.load(decay + chunk * BT + BT - 1)
        fade = tl.exp(end - d)[:, None]
        k_end = (k_tile * fade).to(k_tile.dtype)
    dk = tl.zeros([BT, F], dtype=tl.float32)
    for offset in range(0, C, BC):
        v_at, _ = _tile(v, bh // H, bh % H, t, L, H, offset, C, BC)
        v_tile = tl.load(v_at, mask=exists, other=0.0)
        dw = tl.load(_state(d_written, chunk, offset, F, C, BC)).to(v_tile.dtype)
        dk += tl.dot(v_tile, tl.trans(dw), input_precision="ieee")
        dv_at, _ = _tile(d_v, bh // H, bh % H, t, L, H, offset, C, BC)
        dv = tl.load(dv_at, mask=exists, other=0.0) + tl.dot(k_end, dw, input_precision="ieee")
        tl.store(dv_at, dv.to(v_tile.dtype), mask=exists)
    if decay is not None:
        dk = dk * fade
        shrink = tl.sum(dk * k_tile, 1)
        at = d_decay + chunk * BT + i
        tl.store(at, tl.load(at) + tl.where(i == BT - 1, tl.sum(shrink, 0), 0.0) - shrink)
    dk_at, _ = _tile(d_k, bh // H, bh % H, t, L, H, 0, F, F)
    dk += tl.load(dk_at, mask=exists, other=0.0)
    tl.store(dk_at, dk.to(k_tile.dtype), mask=exists)


@triton.jit
def _read_forward(
    q, k, v, decay, before, o, L, H, N, F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr
):
    bh, n, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BC
    chunk = bh.to(tl.int64) * N + n
    t, i = n * BT + tl.arange(0, BT), tl.arange(0, BT)
    q_at, exists = _tile(q, bh // H, bh % H, t, L, H, 0, F, F)
    k_at, _ = _tile(k, bh // H, bh % H, t, L, H, 0, F, F)
    v_at, _ = _tile(v, bh // H, bh % H, t, L, H, offset, C, BC)
    q_tile, k_tile = tl.load(q_at, mask=exists, other=0.0), tl.load(k_at, mask=exists, other=0.0)
    v_tile = tl.load(v_at, mask=exists, other=0.0)
    past = i[:, None] >= i[None, :]
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    state = tl.load(_state(before, chunk, offset, F, C, BC)).to(v_tile.dtype)
    far = tl.dot(q_tile, state, input_precision="ieee")
    if decay is None:
        scores = tl.where(past, scores, 0.0)
    else:
        d = tl.load(decay + chunk * BT + i)
        scores *= tl.exp(tl.where(past, d[:, None] - d[None, :], float("-inf")))
        far *= tl.exp(d)[:, None]
    out = far + tl.dot(scores.to(v_tile.dtype), v_tile, input_precision="ieee")
    o_at, _ = _tile(o, bh // H, bh % H, t, L, H, offset, C, BC)
    tl.store(o_at, out.to(v_tile.dtype), mask=exists)


@triton.jit
def _read_backward(
    q, k, v, decay, before, d_o, d_q, d_k, d_v, d_decay, d_before, L, H, N,
    F: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    bh, n = tl.program_id(0), tl.program_id(1)
    b, h, chunk = bh // H, bh % H, bh.to(tl.int64) * N + n
    t, i = n * BT + tl.arange(0, BT), tl.arange(0, BT)
    q_at, exists = _tile(q, b, h, t, L, H, 0, F, F)
    k_at, _ = _tile(k, b, h, t, L, H, 0, F, F)
    q_tile, k_tile = tl.load(q_at, mask=exists, other=0.0), tl.load(k_at, mask=exists, other=0.0)
    past = i[:, None] >= i[None, :]
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    q_fade = q_tile
    if decay is None:
        scores = tl.where(past, scores, 0.0)
    else:
        d = tl.load(decay + chunk * BT + i)
        between = tl.exp(tl.where(past, d[:, None] - d[None, :], float("-inf")))
        fade = tl.exp(d)[:, None]
        scores *= between
        q_fade = (q_tile * fade).to(q_tile.dtype)
    d_scores = tl.zeros([BT, BT], dtype=tl.float32)
    dq_far = tl.zeros([BT, F], dtype=tl.float32)
    for offset in range(0, C, BC):
        v_at, _ = _tile(v, b, h, t, L, H, offset, C, BC)
        do_at, _ = _tile(d_o, b, h, t, L, H, offset, C, BC)
        v_tile, do = tl.load(v_at, mask=exists, other=0.0), tl.load(do_at, mask=exists, other=0.0)
        state = tl.load(_state(before, chunk, offset, F, C, BC)).to(v_tile.dtype)
        d_scores += tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        dq_far += tl.dot(do, tl.trans(state), input_precision="ieee")
        dv = tl.dot(tl.trans(scores.to(do.dtype)), do, input_precision="ieee")
        dv_at, _ = _tile(d_v, b, h, t, L, H, offset, C, BC)
        tl.store(dv_at, dv.to(v_tile.dtype), mask=exists)
        ds = tl.dot(tl.trans(q_fade), do, input_precision="ieee")
        tl.store(_state(d_before, chunk, offset, F, C, BC), ds)
    if decay is None:
        d_scores = tl.where(past, d_scores, 0.0)
    else:
        dq_far *= fade
        change = d_scores * scores  # of the exponents d_i − d_j
        tl.store(d_decay + chunk * BT + i, tl.sum(change, 1) - tl.sum(change, 0) + tl.sum(dq_far * q_tile, 1))
        d_scores *= between
    d_scores = d_scores.to(k_tile.dtype)
    dq = dq_far + tl.dot(d_scores, k_tile, input_precision="ieee")
    dk = tl.dot(tl.trans(d_scores), q_tile, input_precision="ieee")
    dq_at, _ = _tile(d_q, b, h, t, L, H, 0, F, F)
    dk_at, _ = _tile(d_k, b, h, t, L, H, 0, F, F)
    tl.store(dq_at, dq.to(q_tile.dtype), mask=exists)
    tl.store(dk_at, dk.to(k_tile.dtype), mask=exists)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, features = k.shape
        chunks, channels = triton.cdiv(length, chunk), v.shape[-1]
        decay = None if log_g is None else linear_attention_scan.summed(log_g, chunk)
        states = torch.empty(batch, heads, chunks, features, channels, dtype=v.dtype, device=v.device)
        o, sizes = torch.empty_like(v), _sizes(k, v, chunk)
        grid = (batch * heads, chunks, channels // sizes["BC"])
        _write_forward[grid](k, v, decay, states, length, heads, chunks, **sizes)
        last = linear_attention_scan.forward(decay, states, state, chunk)
        _read_forward[grid](q, k, v, decay, states, o, length, heads, chunks, **sizes)
        ctx.save_for_backward(q, k, v, log_g, decay, states)
        ctx.chunk = chunk
        return o, last

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_g, decay, states = ctx.saved_tensors
        batch, heads, chunks = states.shape[:3]
        d_q, d_k, d_v, d_decay, d_states = _read_gradients(q, k, v, decay, states, d_o, ctx.chunk)
        d_kept, d_state = linear_attention_scan.backward(decay, states, d_states, d_last.contiguous(), ctx.chunk)
        arguments = (k, v, decay, d_states, d_k, d_v, d_decay, k.shape[1], heads, chunks)
        _write_backward[(batch * heads, chunks)](*arguments, **_sizes(k, v, ctx.chunk, backward=True))
        d_log_g = None if d_decay is None else linear_attention_scan.unsummed(d_decay, d_kept, log_g)
        return d_q, d_k, d_v, d_log_g, d_state, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, before: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(q, k, v, decay, before)
        ctx.chunk = chunk
        batch, heads, chunks = before.shape[:3]
        o, sizes = torch.empty_like(v), _sizes(k, v, chunk)
        grid = (batch * heads, chunks, v.shape[-1] // sizes["BC"])
        _read_forward[grid](q, k, v, decay, before, o, k.shape[1], heads, chunks, **sizes)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, before = ctx.saved_tensors
        return *_read_gradients(q, k, v, decay, before, d_o, ctx.chunk), None


def _read_gradients(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, before: Tensor, d_o: Tensor, chunk: int
) -> list[Any]:
    batch, heads, chunks = before.shape[:3]
    grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, decay, before)]
    arguments = (q, k, v, decay, before, d_o.contiguous(), *grads, k.shape[1], heads, chunks)
    _read_backward[(batch * heads, chunks)](*arguments, **_sizes(k, v, chunk, backward=True))
    return grads


def _sizes(k: Tensor, v: Tensor, chunk: int, backward: bool = False) -> dict[str, int]:
    """Channels of v at once, and warps: such that the tiles of one program fit its registers."""
    features, channels, wide = k.shape[-1], v.shape[-1], k.shape[-1] > 64
    block = min(channels, 32 if wide and backward else 64)
    return {"F": features, "C": channels, "BC": block, "BT": chunk, "num_warps": 8 if wide or backward else 4}


def read(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, before: Tensor, chunk: int) -> Tensor:
    """What each token reads, when the states before each chunk are known."""
    return _Read.apply(q.contiguous(), k.contiguous(), v.contiguous(), decay, before.contiguous(), chunk)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """As linear_attention.chunked; q and k are brought to the dtype of v."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if state is None:
        state = torch.zeros(k.shape[0], *k.shape[2:], v.shape[-1], device=v.device)
    log_g = None if log_g is None else log_g.contiguous()
    return _Chunked.apply(q.contiguous(), k.contiguous(), v.contiguous(), log_g, state.float().contiguous(), chunk)
