"""Which earlier tokens a token reads in sparse softmax attention (Child et al. 2019, arXiv 1904.10509, §4.2–4.3).

With stride ℓ and c summary positions, token i reads, of the tokens j ≤ i:

    sliding(w)     i − j < w
    strided(ℓ)     i − j < ℓ   or   (i − j) mod ℓ = 0
    fixed(ℓ, c)    ⌊j/ℓ⌋ = ⌊i/ℓ⌋   or   j mod ℓ ≥ ℓ − c

Strided and fixed are unions of the paper's two sets, read by every head. A pattern says the same thing three ways:
`allowed` for a dense mask (the definition), `reads` as a list of positions (decoding), and `parts` as intervals
(training on a GPU): sorted suitably, what each token reads of near tokens is one run of consecutive keys, and of far
tokens another, so that each part fills whole blocks of a block mask however fine the pattern is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.packing import Packing


@dataclass(frozen=True)
class Part:
    """Query number n is token `queries[n]` and reads keys number first[n] to end[n] - 1, which are tokens `keys`.

    `first` and `end` never fall from one query to the next. None for an order: all tokens as they lie in the pack.
    """

    first: Tensor
    end: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class Sliding:
    window: int

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether position i reads position j; broadcasts."""
        return (j <= i) & (i - j < self.window)

    def reads(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The positions that each query reads and which of these entries exist, both [T, P]; P depends on `longest`, a
        bound on the sequences' lengths, alone."""
        read_TP = positions_T[:, None] - torch.arange(min(self.window, longest), device=positions_T.device)
        return read_TP.clamp(min=0), read_TP >= 0

    def parts(self, packing: Packing) -> Iterator[Part]:
        """Intervals for a pack of whole sequences; between them every pair of tokens is covered once."""
        index_T = torch.arange(len(packing.positions_T), device=packing.positions_T.device)
        yield Part(index_T - packing.positions_T.clamp(max=self.window - 1), index_T + 1)


@dataclass(frozen=True)
class Strided:
    stride: int

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < self.stride) | ((i - j) % self.stride == 0))

    def reads(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        device = positions_T.device
        near = torch.arange(self.stride, device=device)
        far = torch.arange(1, (longest - 1) // self.stride + 1, device=device) * self.stride
        read_TP = positions_T[:, None] - torch.cat([near, far])
        return read_TP.clamp(min=0), read_TP >= 0

    def parts(self, packing: Packing) -> Iterator[Part]:
        yield from Sliding(self.stride).parts(packing)
        # Sorted by sequence, then by position modulo the stride: what a token reads lies right before it.
        steps_T = packing.positions_T // self.stride  # how many far tokens it reads
        key_T = packing.positions_T % self.stride + packing.sequence_T * self.stride
        order_T = key_T.argsort(stable=True)
        index_T = torch.arange(len(order_T), device=order_T.device)
        yield Part(index_T - steps_T[order_T], index_T, order_T, order_T)


@dataclass(frozen=True)
class Fixed:
    stride: int
    summary: int

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        summary = j % self.stride >= self.stride - self.summary
        return (j <= i) & ((j // self.stride == i // self.stride) | summary)

    def reads(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        device, stride = positions_T.device, self.stride
        block_T1 = positions_T[:, None] // stride
        near_TP = block_T1 * stride + torch.arange(stride, device=device)
        ends = torch.arange(1, longest // stride + 1, device=device) * stride
        far_P = (ends[:, None] - self.summary + torch.arange(self.summary, device=device)).flatten()
        far_TP = far_P.expand(len(positions_T), -1)
        exists = torch.cat([near_TP <= positions_T[:, None], far_TP // stride < block_T1], 1)
        return torch.cat([near_TP, far_TP], 1).where(exists, 0), exists

    def parts(self, packing: Packing) -> Iterator[Part]:
        positions_T = packing.positions_T
        index_T = torch.arange(len(positions_T), device=positions_T.device)
        yield Part(index_T - positions_T % self.stride, index_T + 1)
        is_summary_T = positions_T % self.stride >= self.stride - self.summary
        before_T = is_summary_T.cumsum(0) - is_summary_T.long()  # summaries earlier in the pack
        first_T = before_T[index_T - positions_T]  # the first one of this sequence
        end_T = before_T[index_T - positions_T % self.stride]  # up to this block
        yield Part(first_T, end_T, None, is_summary_T.nonzero().squeeze(-1))


Pattern = Sliding | Strided | Fixed
