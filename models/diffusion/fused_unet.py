"""A UNet for sampling: what depends on the time or the text alone is computed for all blocks at once.

time    every residual block's projection of the time embedding, in one product a step
text    every cross-attention's keys and values, in one product a prompt (`UNet.read`)
pixels  queries, keys and values of a self-attention, in one product
"""

import torch
from torch import Tensor, nn

from models.diffusion.attention import Attention, TransformerBlock, attention
from models.diffusion.lora import adapters
from models.diffusion.resnet import ResnetBlock
from models.diffusion.unet import UNet


class Part(nn.Module):
    """`width` channels, from `start` on, of what was computed for all."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(-1, self.start, self.width)


class SelfAttention(nn.Module):
    def __init__(self, separate: Attention) -> None:
        super().__init__()
        self.heads, self.to_out = separate.heads, separate.to_out
        self.to_qkv = _joined([_linear(p) for p in (separate.to_q, separate.to_k, separate.to_v)])

    def forward(self, x_BLC: Tensor) -> Tensor:
        q_BLC, k_BLC, v_BLC = self.to_qkv(x_BLC).chunk(3, dim=-1)
        return self.to_out[0](attention(q_BLC, k_BLC, v_BLC, self.heads))


def fuse(unet: UNet) -> None:
    """In place. The same function up to rounding, for inference: unet(x, time, unet.read(context)).

    It can no longer be trained, nor saved under a checkpoint's names. Raises ValueError if it has adapters.
    """
    if adapters(unet):
        raise ValueError("a UNet with adapters cannot be fused: merge them first")
    of_time: list[nn.Linear] = []
    of_text: list[nn.Linear] = []
    for module in list(unet.modules()):
        if isinstance(module, ResnetBlock):
            module.time_emb_proj = _part_of(of_time, module.time_emb_proj)
        elif isinstance(module, TransformerBlock):
            assert isinstance(module.attn1, Attention)
            assert isinstance(module.attn2, Attention)
            module.attn1 = SelfAttention(module.attn1)
            module.attn2.to_k, module.attn2.to_v = (
                _part_of(of_text, p) for p in (module.attn2.to_k, module.attn2.to_v)
            )
    unet.time_embedding = nn.Sequential(unet.time_embedding, _joined(of_time))
    unet.read = _joined(of_text)
    unet.eval().requires_grad_(False)


def _part_of(all_of_them: list[nn.Linear], one: nn.Module) -> Part:
    start = sum(linear.out_features for linear in all_of_them)
    all_of_them.append(_linear(one))
    return Part(start, _linear(one).out_features)


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer with the outputs of all."""
    weight = torch.cat([linear.weight for linear in linears])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
