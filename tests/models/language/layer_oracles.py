"""Whole layers of other libraries with our weights: torch's encoder layer, pre- and post-norm, and Gemma 2's."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

from models.language.decoder import Decoder, DecoderLayer
from models.language.packing import Packing
from models.language.rope import rotation
from tests.models.language.policies import DENSE

LENGTH, WIDTH, HEADS, HEAD_DIM = 20, 64, 4, 16


@dataclass
class Pair:
    """Our layer and theirs, both from and to [T, D], and which of their parameters is which of ours."""

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]
    parameters: list[tuple[nn.Parameter, nn.Parameter]]  # equal in the rows that both have


def pair(kind: str) -> Pair:
    norm_type = "rms_norm" if kind == "sandwich" else "layer_norm"
    config = replace(
        DENSE, num_key_value_heads=HEADS, qk_norm=False, norm_placement=kind, norm_type=norm_type, rms_norm_eps=1e-6
    )
    model = Decoder(config).init_weights(0)
    layer, packing = model.layers[0], Packing.of([LENGTH])
    assert isinstance(layer, DecoderLayer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.add_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    cos_sin = rotation(model.rope_frequency, packing.positions_T, torch.float32)
    if kind != "sandwich":  # torch's layer knows no rotation
        cos_sin = (torch.ones_like(cos_sin[0]), torch.zeros_like(cos_sin[1]))

    def ours(x_TD: Tensor) -> Tensor:
        return layer(x_TD, packing, cos_sin, None, None)

    theirs, parameters = (_gemma2 if kind == "sandwich" else _torch)(layer, kind, cos_sin)
    return Pair(ours, theirs, parameters)


def _torch(layer: DecoderLayer, kind: str, cos_sin: tuple[Tensor, Tensor]) -> tuple[Callable, list]:
    inner = DENSE.intermediate_size

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    oracle = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * inner, 0.0, swiglu, 1e-6, batch_first=True, norm_first=kind == "pre"
    )
    oracle.linear2 = nn.Linear(inner, WIDTH)
    attention, mlp = layer.self_attn, layer.mlp
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias") and "norm" not in name:
                parameter.zero_()
        projections = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
        oracle.self_attn.in_proj_weight.copy_(torch.cat(projections))
        oracle.linear1.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    same = [
        (attention.o_proj.weight, oracle.self_attn.out_proj.weight),
        (mlp.down_proj.weight, oracle.linear2.weight),
        (layer.input_layernorm.weight, oracle.norm1.weight),
        (layer.input_layernorm.bias, oracle.norm1.bias),
        (layer.post_attention_layernorm.weight, oracle.norm2.weight),
        (layer.post_attention_layernorm.bias, oracle.norm2.bias),
    ]
    _copy(same)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    # The stacked ones begin with q and gate.
    stacked = [
        (attention.q_proj.weight, oracle.self_attn.in_proj_weight),
        (mlp.gate_proj.weight, oracle.linear1.weight),
    ]
    return lambda x_TD: oracle(x_TD[None], src_mask=mask, is_causal=True)[0], same + stacked


def _gemma2(layer: DecoderLayer, kind: str, cos_sin: tuple[Tensor, Tensor]) -> tuple[Callable, list]:
    config = Gemma2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_DIM,
        intermediate_size=DENSE.intermediate_size, hidden_activation="silu", query_pre_attn_scalar=HEAD_DIM,
        attn_logit_softcapping=None, num_hidden_layers=1, layer_types=["full_attention"], rms_norm_eps=1e-6,
        attn_implementation="eager",
    )  # fmt: skip
    oracle = Gemma2DecoderLayer(config, 0).eval()
    same = [(getattr(layer.self_attn, n).weight, getattr(oracle.self_attn, n).weight) for n in
            ("q_proj", "k_proj", "v_proj", "o_proj")]  # fmt: skip
    same += [(getattr(layer.mlp, n).weight, getattr(oracle.mlp, n).weight) for n in
             ("gate_proj", "up_proj", "down_proj")]  # fmt: skip
    norms = [
        (layer.input_layernorm.weight, oracle.input_layernorm.weight),
        (layer.attention_residual.outer_norm.weight, oracle.post_attention_layernorm.weight),
        (layer.post_attention_layernorm.weight, oracle.pre_feedforward_layernorm.weight),
        (layer.mlp_residual.outer_norm.weight, oracle.post_feedforward_layernorm.weight),
    ]
    _copy(same + norms)
    with torch.no_grad():
        for _, theirs in norms:
            theirs -= 1  # Gemma multiplies by 1 + weight
    cos, sin = (torch.cat([x, x], -1).transpose(0, 1) for x in cos_sin)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]

    def theirs(x_TD: Tensor) -> Tensor:
        return oracle(x_TD[None], position_embeddings=(cos, sin), attention_mask=mask)[0]

    return theirs, same + norms


@torch.no_grad()
def _copy(parameters: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    for ours, theirs in parameters:
        theirs.copy_(ours)


def differences(kind: str) -> tuple[float, float]:
    """Largest difference of outputs, and of the gradients of input and parameters."""
    both = pair(kind)
    x_TD = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    direction_TD = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    outputs, inputs = [], []
    for function in (both.ours, both.theirs):
        given = x_TD.clone().requires_grad_()
        outputs.append(function(given))
        (outputs[-1] * direction_TD).sum().div(LENGTH).backward()
        inputs.append(given.grad)
    gradients = [(inputs[0], inputs[1]), *((ours.grad, theirs.grad[: len(ours)]) for ours, theirs in both.parameters)]
    assert all(ours.abs().max() > 0.01 for ours, _ in gradients)
    forward = (outputs[0] - outputs[1]).abs().max().item()
    return forward, max((ours - theirs).abs().max().item() for ours, theirs in gradients)
