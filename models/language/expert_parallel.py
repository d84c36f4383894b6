"""Expert parallelism: each process of a group holds some of the experts, and rows travel to them and back (GShard,
arXiv 2006.16668, section 3.2).

T tokens of this process, K experts per token, E experts of all processes, R processes, P = E / R experts here; S rows
that leave, A rows that arrive. Every process has tokens of its own, so the group is one of data parallelism too.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.errors import UserError
from models.language.decoder import Decoder, DecoderLayer
from models.language.dispatch import Dispatch
from models.language.experts import Experts, grouped_swiglu
from models.language.lora_layers import Adapted


class ParallelExperts(nn.Module):
    """This process's share of `experts`, in the place of the whole: experts r·P to (r+1)·P of process r."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        """Raises UserError if the experts cannot be dealt out evenly."""
        super().__init__()
        self.group = group
        self.num_experts, ranks = experts.down_proj.shape[0], group.size()
        if self.num_experts % ranks:
            raise UserError(
                f"expert parallelism: {ranks} processes do not divide num_experts ({self.num_experts}); "
                "use a number of processes that does"
            )
        share = self.num_experts // ranks
        mine = slice(group.rank() * share, (group.rank() + 1) * share)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(experts.down_proj.detach()[mine].clone())

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        """What Experts.forward gives for this process's tokens. All processes of the group have to call it together.

        In the backward pass a weight's gradient is the sum over all processes' tokens.
        """
        leaving = Dispatch.of(experts_TK, self.num_experts, kept_TK)
        sent_RP = leaving.ends_E.long().diff(prepend=leaving.ends_E.new_zeros(1)).view(self.group.size(), -1)
        arrived_RP = torch.empty_like(sent_RP)
        dist.all_to_all_single(arrived_RP, sent_RP, group=self.group)
        out, back = sent_RP.sum(1).tolist(), arrived_RP.sum(1).tolist()
        x_AD = _Exchange.apply(leaving.spread(x_TD), out, back, self.group)
        weights_A1 = _Exchange.apply(leaving.take(weights_TK)[:, None], out, back, self.group)

        # Rows come sorted by sender and then by expert; the product wants those of one expert together.
        share = arrived_RP.shape[1]
        expert_RP = torch.arange(share, device=x_TD.device).expand_as(arrived_RP)
        expert_A1 = expert_RP.flatten().repeat_interleave(arrived_RP.flatten())[:, None]
        arrived = Dispatch.of(expert_A1, share)
        y_AD = grouped_swiglu(
            arrived.spread(x_AD), arrived.take(weights_A1), arrived.ends_E, self.gate_up_proj, self.down_proj
        )
        return leaving.collect(_Exchange.apply(arrived.collect(y_AD), back, out, self.group))


def distribute_experts(model: Decoder, group: dist.ProcessGroup) -> None:
    """Keep this process's share of every mixture layer's experts; the model must be the same in all processes.

    What stays whole (routers, attention, embeddings) has gradients of this process's tokens alone: sum them over the
    group. Raises UserError if the experts cannot be dealt out evenly, or have adapters.
    """
    for layer in model.layers:
        layer = cast(DecoderLayer, layer)
        if layer.is_moe:
            if isinstance(layer.mlp.experts, Adapted):
                raise UserError("expert parallelism: experts with adapters are not dealt out; fold the adapters first")
            layer.mlp.experts = ParallelExperts(cast(Experts, layer.mlp.experts), group)


class _Exchange(torch.autograd.Function):
    """Send `out[r]` rows to process r and get `back[r]` from it; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, out: list[int], back: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.out, ctx.back, ctx.group = out, back, group
        return _all_to_all(x_SD, out, back, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.back, ctx.out, ctx.group), None, None, None


def _all_to_all(x_SD: Tensor, out: list[int], back: list[int], group: dist.ProcessGroup) -> Tensor:
    y_AD = x_SD.new_empty(sum(back), x_SD.shape[1])
    dist.all_to_all_single(y_AD, x_SD.contiguous(), back, out, group=group)
    return y_AD
