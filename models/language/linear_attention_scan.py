"""What linear attention's kernels share with those of the delta rule, and the part of theirs that runs along the
sequence: sums of log-decays within a chunk, and the scan over chunks' states.

    S_{n+1} = exp(d_end) S_n + W_n          d_end the decay of chunk n, W_n what it writes

The scan works in place: on the way forward W_n is replaced by S_n, on the way back the gradient of S_n by that of W_n.

Shapes as in linear_attention_kernels.py: log_g [B, L, H], decay float32 [B, H, N, chunk], states [B, H, N, F, C], first
and last state float32 [B, H, F, C].
"""

# mypy: disallow-untyped-defs=False, disable-error-code=assignment
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A scan waits for memory: hence many small programs, each of which reads AHEAD chunks before it works on the first.
SCAN = {"BLOCK": 64, "AHEAD": 8, "num_warps": 2}


@triton.jit
def _decay_forward(log_g, decay, L, H, N, BT: tl.constexpr):
    bh, n, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BT)
    t = n * BT + i
    at = ((bh // H) * L + t).to(tl.int64) * H + bh % H
    summed = tl.cumsum(tl.load(log_g + at, mask=t < L, other=0.0).to(tl.float32), 0)
    tl.store(decay + (bh.to(tl.int64) * N + n) * BT + i, summed)


@triton.jit
def _decay_backward(d_decay, d_kept, d_log_g, L, H, N, BLOCKS: tl.constexpr, BT: tl.constexpr):
    bh, n, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BT)
    chunk = bh.to(tl.int64) * N + n
    d = tl.load(d_decay + chunk * BT + i)
    if d_kept is not None:  # of the scan, which reads the chunk's last sum, in parts
        d += tl.where(i == BT - 1, tl.sum(tl.load(d_kept + chunk * BLOCKS + tl.arange(0, BLOCKS)), 0), 0.0)
    t = n * BT + i
    at = ((bh // H) * L + t).to(tl.int64) * H + bh % H
    tl.store(d_log_g + at, tl.cumsum(d, 0, reverse=True), mask=t < L)


@triton.jit
def _advance(s, states, decay, chunk, SIZE: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr):
    """Over AHEAD chunks, in place: what each writes becomes the state before it."""
    written, kept = (), ()
    for j in tl.static_range(AHEAD):
        written = written + (tl.load(states + (chunk + j) * SIZE),)
        if decay is not None:
            kept = kept + (tl.exp(tl.load(decay + (chunk + j) * BT + BT - 1)),)
    for j in tl.static_range(AHEAD):
        tl.store(states + (chunk + j) * SIZE, s)
        if decay is not None:
            s *= kept[j]
        s += written[j]
    return s


@triton.jit
def _scan_forward(
    decay, states, state, last, N, SIZE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    bh, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(state + bh * SIZE + at)
    for n in range(0, N // AHEAD * AHEAD, AHEAD):
        s = _advance(s, states + at, decay, bh * N + n, SIZE, BT, AHEAD)
    for n in range(N // AHEAD * AHEAD, N):
        s = _advance(s, states + at, decay, bh * N + n, SIZE, BT, 1)
    tl.store(last + bh * SIZE + at, s)


@triton.jit
def _retreat(
    ds, states, d_states, decay, d_kept, chunk, SIZE: tl.constexpr, BT: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Over AHEAD chunks that end with this one, in place: the gradient of the state before each becomes that of what it
    writes."""
    before, d_before, kept = (), (), ()
    for j in tl.static_range(AHEAD):
        d_before = d_before + (tl.load(d_states + (chunk - j) * SIZE),)
        if decay is not None:
            before = before + (tl.load(states + (chunk - j) * SIZE),)
            kept = kept + (tl.exp(tl.load(decay + (chunk - j) * BT + BT - 1)),)
    for j in tl.static_range(AHEAD):
        tl.store(d_states + (chunk - j) * SIZE, ds)
        if decay is not None:
            ds *= kept[j]
            tl.store(d_kept + (chunk - j) * BLOCKS, tl.sum(ds * before[j], 0))
        ds += d_before[j]
    return ds


@triton.jit
def _scan_backward(
    decay, states, d_states, d_last, d_kept, d_state, N,
    SIZE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    bh, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    ds = tl.load(d_last + bh * SIZE + at)
    kept_at = d_kept if d_kept is None else d_kept + block
    for n in range(0, N // AHEAD * AHEAD, AHEAD):
        end = bh * N + N - 1 - n
        ds = _retreat(ds, states + at, d_states + at, decay, kept_at, end, SIZE, BT, SIZE // BLOCK, AHEAD)
    for n in range(N // AHEAD * AHEAD, N):
        end = bh * N + N - 1 - n
        ds = _retreat(ds, states + at, d_states + at, decay, kept_at, end, SIZE, BT, SIZE // BLOCK, 1)
    tl.store(d_state + bh * SIZE + at, ds)


def forward(decay: Tensor | None, states: Tensor, state: Tensor, chunk: int) -> Tensor:
    """The state after the last chunk; `states` are replaced."""
    batch, heads, chunks, features, channels = states.shape
    size, last = features * channels, torch.empty_like(state)
    grid = (batch * heads, size // SCAN["BLOCK"])
    _scan_forward[grid](decay, states, state, last, chunks, SIZE=size, BT=chunk, **SCAN)
    return last


def backward(
    decay: Tensor | None, states: Tensor, d_states: Tensor, d_last: Tensor, chunk: int
) -> tuple[Tensor | None, Tensor]:
    """The gradients of each chunk's last decay, in parts [B, H, N, parts], and of the first state; `d_states` are
    replaced."""
    batch, heads, chunks, features, channels = states.shape
    size, d_state = features * channels, torch.empty_like(d_last)
    blocks = size // SCAN["BLOCK"]
    d_kept = None if decay is None else torch.empty(batch, heads, chunks, blocks, device=decay.device)
    arguments = (decay, states, d_states, d_last, d_kept, d_state, chunks)
    _scan_backward[(batch * heads, blocks)](*arguments, SIZE=size, BT=chunk, **SCAN)
    return d_kept, d_state


def summed(log_g: Tensor, chunk: int) -> Tensor:
    """Log-decays summed from each chunk's start."""
    batch, length, heads = log_g.shape
    chunks = triton.cdiv(length, chunk)
    decay = torch.empty(batch, heads, chunks, chunk, dtype=torch.float32, device=log_g.device)
    _decay_forward[(batch * heads, chunks)](log_g, decay, length, heads, chunks, BT=chunk, num_warps=1)
    return decay


def unsummed(d_decay: Tensor, d_kept: Tensor | None, log_g: Tensor) -> Tensor:
    """The gradient of log_g; d_kept, of each chunk's last sum, is added to d_decay first."""
    batch, heads, chunks, chunk = d_decay.shape
    d_log_g, blocks = torch.empty_like(log_g), 1 if d_kept is None else d_kept.shape[-1]
    arguments = (d_decay, d_kept, d_log_g, log_g.shape[1], heads, chunks)
    _decay_backward[(batch * heads, chunks)](*arguments, BLOCKS=blocks, BT=chunk, num_warps=1)
    return d_log_g


class _ChunkDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_g: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(log_g)
        return summed(log_g, chunk)

    @staticmethod
    def backward(ctx: Any, d_decay: Tensor) -> tuple[Tensor, None]:
        (log_g,) = ctx.saved_tensors
        return unsummed(d_decay.contiguous(), None, log_g), None


def chunk_decay(log_g: Tensor, chunk: int) -> Tensor:
    """The same as `summed`, for autograd."""
    return _ChunkDecay.apply(log_g.contiguous(), chunk)
