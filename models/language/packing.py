"""Packing: a batch is the tokens of several sequences one after another, without padding.

Shape suffixes used in this folder:
    T tokens of the whole pack          B sequences         L longest sequence (padded)
    D hidden size                       H query heads       K key/value heads    C head dimension (channels)
    E experts                           V vocabulary        N chunks
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each sequence of a pack lies, and which position its first token has."""

    lengths: tuple[int, ...]
    starts: tuple[int, ...]  # position of each sequence's first token: 0, or what its cache already holds
    cu_seqlens: Tensor  # int32 [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]
    positions_T: Tensor  # int64: position of each token in its own sequence
    sequence_T: Tensor  # int64: which sequence each token belongs to
    slots_T: Tensor  # int64: where each token lies in a padded [B * L]

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        starts: Sequence[int] | None = None,
    ) -> "Packing":
        """Pack sequences of the given lengths (each at least 1)."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a packing needs sequences of at least one token, got lengths {list(lengths)}")
        starts = (0,) * len(lengths) if starts is None else starts
        # Built on the host and sent once: reading a length back from a GPU would stall it.
        length_B = torch.tensor(lengths)
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), length_B)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)])
        offset_T = torch.arange(sequence_T.numel()) - cu_seqlens[sequence_T]
        return cls(
            lengths=tuple(lengths),
            starts=tuple(starts),
            cu_seqlens=on_device(cu_seqlens, device, torch.int32),
            positions_T=on_device(offset_T + torch.tensor(starts)[sequence_T], device),
            sequence_T=on_device(sequence_T, device),
            slots_T=on_device(sequence_T * max(lengths) + offset_T, device),
        )

    def after(self, starts: Sequence[int]) -> "Packing":
        """The same lengths, continuing sequences that already have `starts` tokens."""
        return Packing.of(self.lengths, self.positions_T.device, starts)

    @property
    def max_len(self) -> int:
        return max(self.lengths)

    @property
    def is_rectangular(self) -> bool:
        return min(self.lengths) == self.max_len

    def pad(self, x_T: Tensor) -> Tensor:
        """[T, ...] → [B, L, ...], zeros after each sequence's end."""
        shape = (len(self.lengths), self.max_len, *x_T.shape[1:])
        if self.is_rectangular:
            return x_T.reshape(shape)
        padded = x_T.new_zeros(shape[0] * shape[1], *x_T.shape[1:])
        return padded.index_copy(0, self.slots_T, x_T).view(shape)

    def unpad(self, x_BL: Tensor) -> Tensor:
        """[B, L, ...] → [T, ...]: the inverse of `pad`."""
        flat = x_BL.flatten(0, 1)
        return flat if self.is_rectangular else flat.index_select(0, self.slots_T)


def on_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the values (a list, an array or a tensor of the host). On a GPU it is copied from pinned memory: a
    copy from any other waits until the GPU has done all that was asked of it before."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
