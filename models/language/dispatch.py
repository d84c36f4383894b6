"""How tokens get to their experts and back: rows sorted by expert, and sums that need no scattered addition.

T tokens, K chosen experts per token, E experts, D hidden size, S rows: the choices that are kept, T·K without dropping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor


def fused_on_cuda(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a chain of element-wise operations into one kernel where its first argument lies on a GPU."""
    fused = cache(lambda: torch.compile(function))  # made at the first use: importing the compiler takes seconds

    @wraps(function)
    def call(first: Tensor, *rest: Any) -> Tensor:
        return (fused() if first.is_cuda else function)(first, *rest)

    return call


@dataclass(frozen=True)
class Dispatch:
    """Where each choice of an expert lies among the rows, those of expert 0 first."""

    choice_S: Tensor  # int64: row s is choice choice_S[s] of the flat [T * K] choices
    token_S: Tensor  # int64: of which token
    row_TK: Tensor  # int64: the row of each choice; S for one that is dropped
    ends_E: Tensor  # int32: the rows of expert e end before ends_E[e]
    dropping: bool

    @classmethod
    def of(cls, experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> "Dispatch":
        """kept_TK: bool, False for choices that are dropped; reading their number waits for the GPU."""
        keys = experts_TK if kept_TK is None else experts_TK.masked_fill(~kept_TK, num_experts)
        # 16 bits: a radix sort passes over them twice instead of eight times. Stable, so a run repeats bit for bit.
        sorted_S, choice_S = keys.flatten().to(torch.int16).sort(stable=True)
        experts_E = torch.arange(num_experts, device=keys.device, dtype=torch.int16)
        ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)
        row_S = torch.arange(len(choice_S), device=keys.device)
        if kept_TK is not None:
            row_S = row_S.clamp(max=int(ends_E[-1]))
        row_TK = torch.empty_like(choice_S).scatter_(0, choice_S, row_S).view(experts_TK.shape)
        if kept_TK is not None:
            choice_S = choice_S[: int(ends_E[-1])]
        return cls(choice_S, choice_S // experts_TK.shape[1], row_TK, ends_E, kept_TK is not None)

    def spread(self, x_TD: Tensor) -> Tensor:
        """Each row gets its token's vector, [S, D]."""
        return _Spread.apply(x_TD, self)

    def collect(self, y_SD: Tensor) -> Tensor:
        """Each token gets the sum of its rows, [T, D]: the transpose of `spread`."""
        return _Collect.apply(y_SD, self)

    def take(self, values_TK: Tensor) -> Tensor:
        """Each row gets its choice's value, [S]."""
        return values_TK.flatten().index_select(0, self.choice_S)


class _Spread(torch.autograd.Function):
    """Autograd's own backward of indexing adds rows one by one where they meet; the inverse index gathers them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x_TD.index_select(0, dispatch.token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0], ctx.dispatch.row_TK, ctx.dispatch.dropping), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return _sum_rows(y_SD, dispatch.row_TK, dispatch.dropping)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.dispatch.token_S), None


@fused_on_cuda
def _sum_rows(y_SD: Tensor, row_TK: Tensor, dropping: bool) -> Tensor:
    if dropping:
        y_SD = torch.cat([y_SD, y_SD.new_zeros(1, y_SD.shape[1])])  # the row of all that is dropped
    return y_SD[row_TK].sum(1)


def within_capacity(experts_TK: Tensor, weights_TK: Tensor, num_experts: int, factor: float) -> Tensor:
    """Which choices find room when an expert takes at most ⌈factor · T · K / E⌉ tokens, bool [T, K].

    An expert that is asked for more drops those that weigh least (batch prioritized routing, Riquelme et al. 2021,
    arXiv 2106.05974, section 4.1); of equal weights the later token goes.
    """
    choices = experts_TK.numel()
    capacity = -int(-factor * choices // num_experts)
    by_weight = weights_TK.detach().flatten().argsort(descending=True, stable=True)
    experts_S, order = experts_TK.flatten()[by_weight].sort(stable=True)  # within an expert the heaviest come first
    begin_S = torch.searchsorted(experts_S, experts_S)  # where the rows of the same expert begin
    kept_S = torch.arange(choices, device=experts_TK.device) - begin_S < capacity
    return torch.empty_like(kept_S).scatter_(0, by_weight[order], kept_S).view(experts_TK.shape)
