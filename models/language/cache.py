"""What decoding keeps of the tokens already read: keys and values, or a recurrent state.

A mixer's cache is any object with `select(rows)`, made by the mixer's `empty_cache`; `Cache` holds one per layer and
the number of tokens each sequence has read.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LayerCache(Protocol):
    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order (int64 [B']); a row may appear more than once."""
        ...


class KeyValueCache:
    """Keys and values of softmax attention, [B, Lmax, K, C]."""

    def __init__(
        self, batch: int, max_len: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(batch, max_len, kv_heads, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class StateCache:
    """The recurrent state of a linear attention, float32 [B, *shape], whatever the length."""

    def __init__(self, batch: int, shape: Sequence[int], device: torch.device) -> None:
        self.state = torch.zeros(batch, *shape, device=device)

    def select(self, rows: Tensor) -> None:
        self.state = self.state[rows]


class Cache:
    """One cache per layer; grows by each call of the decoder that is given it."""

    def __init__(self, layers: Sequence[LayerCache], batch: int, max_len: int, device: torch.device) -> None:
        self.layers = layers
        self.lengths = [0] * batch  # tokens read so far, on the host
        self.max_len = max_len
        self.device = device

    def select(self, rows: Sequence[int]) -> None:
        """Keep these sequences: drop finished ones, reorder, or repeat a prompt for several samples."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.select(index)
        self.lengths = [self.lengths[row] for row in rows]

    def advance(self, lengths: Sequence[int]) -> None:
        self.lengths = [have + new for have, new in zip(self.lengths, lengths, strict=True)]
