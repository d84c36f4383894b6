"""How signals and gradients pass through a decoder, layer by layer, and what one step of Adam does to it.

T tokens, D hidden size, H heads, C head dimension. RMS is over all tokens and channels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.attention import SoftmaxAttention
from models.language.decoder import Decoder
from models.language.packing import Packing
from models.language.parametrisation import learning_rate_multipliers


@dataclass(frozen=True)
class LayerFigures:
    """One layer, numbered from 0. Its output is the residual stream after it."""

    mixer: str
    stream: float  # RMS of the output
    attention: float  # RMS of what the sequence mixer gives, before it is added to the stream
    mlp: float | None  # the same of the MLP or experts; None for layers without one
    gradient: float  # RMS of the loss's gradient with respect to the output, times the number of tokens
    weight_gradient: float  # norm of the gradient of all the layer's parameters
    rate: float  # ‖update‖ / ‖weight‖ of its matrices in one step of Adam: the effective learning rate
    moved: float  # RMS of what that step changes in the output, over the output's own
    entropy: float | None  # of softmax attention, 1 where it is uniform over what a token can read


@dataclass(frozen=True)
class Inspection:
    parameters: int
    loss: float  # mean cross-entropy of the next token; log V for a model that knows nothing
    logits: float  # standard deviation over the vocabulary
    embedding: float  # RMS of the stream before the first layer
    layers: list[LayerFigures]


def inspect_model(model: Decoder, tokens_T: Tensor, packing: Packing, lr: float) -> Inspection:
    """Measure, and take one step of Adam from zero moments at rate lr: the model is not the same afterwards."""
    with _recording(model) as record:
        hidden_TD = model(tokens_T, packing)
        loss, logits_TV = _next_token_loss(model, hidden_TD, tokens_T, packing)
        model.zero_grad()
        loss.backward()
    before = [output.detach() for output in record.outputs]
    gradients = [output.grad for output in record.outputs]
    weight_gradients = [_norm(p.grad for p in layer.parameters() if p.grad is not None) for layer in model.layers]
    rates = _adam_step(model, lr)
    with torch.no_grad(), _recording(model) as after:
        model(tokens_T, packing)
    layers = [
        LayerFigures(
            mixer=model.config.mixer_kind(i),
            stream=_rms(before[i]),
            attention=_rms(record.mixed[i]),
            mlp=_rms(record.fed_forward[i]) if i in record.fed_forward else None,
            gradient=_rms(gradients[i]) * len(tokens_T),
            weight_gradient=weight_gradients[i],
            rate=rates[i],
            moved=_rms(after.outputs[i] - before[i]) / max(_rms(before[i]), 1e-30),
            entropy=record.entropies.get(i),
        )
        for i in range(len(model.layers))
    ]
    return Inspection(
        parameters=sum(p.numel() for p in model.parameters()),
        loss=loss.item(),
        logits=logits_TV.std(-1).mean().item(),
        embedding=_rms(record.embedded),
        layers=layers,
    )


def _next_token_loss(model: Decoder, hidden_TD: Tensor, tokens_T: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    logits_TV = model.logits(hidden_TD)
    ends = set((packing.cu_seqlens[1:] - 1).tolist())
    predicting = torch.tensor([t for t in range(len(tokens_T)) if t not in ends], device=tokens_T.device)
    return F.cross_entropy(logits_TV[predicting].float(), tokens_T[predicting + 1]), logits_TV.detach()


def _adam_step(model: Decoder, lr: float) -> list[float]:
    """‖update‖ / ‖weight‖ over each layer's matrices. The first step of Adam is lr · sign(gradient)."""
    rates = learning_rate_multipliers(model)
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    adam = torch.optim.Adam([{"params": [p], "lr": lr * rates.get(name, 1.0)} for name, p in named.items()])
    before = {name: p.detach().clone() for name, p in named.items()}
    adam.step()
    ratios = []
    for i in range(len(model.layers)):
        mine = [name for name, p in named.items() if name.startswith(f"layers.{i}.") and p.dim() > 1]
        update, weight = (
            _norm(tensors)
            for tensors in ([named[name].detach() - before[name] for name in mine], [before[name] for name in mine])
        )
        ratios.append(update / weight if weight else 0.0)
    return ratios


class _Record:
    """What the hooks saw: the stream after each layer, its branches, and the entropies of its attention."""

    def __init__(self) -> None:
        self.embedded = torch.empty(0)
        self.outputs: list[Tensor] = []
        self.mixed: dict[int, Tensor] = {}
        self.fed_forward: dict[int, Tensor] = {}
        self.entropies: dict[int, float] = {}


@contextmanager
def _recording(model: Decoder) -> Iterator[_Record]:
    record = _Record()

    def embedded(module: nn.Module, inputs: Any, output: Tensor) -> None:
        record.embedded = output.detach()

    def output_of(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        record.outputs.append(output)

    def mixer(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            record.mixed[i] = output.detach()
            if isinstance(module, SoftmaxAttention):
                record.entropies[i] = attention_entropy(module, *inputs[:3])

        return hook

    def mlp(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            record.fed_forward[i] = output.detach()

        return hook

    handles = [model.embed_tokens.register_forward_hook(embedded)]
    for i, layer in enumerate(model.layers):
        handles.append(layer.register_forward_hook(output_of))
        handles.append(layer.self_attn.register_forward_hook(mixer(i)))  # type: ignore[union-attr]
        if model.config.has_mlp(i):
            handles.append(layer.mlp.register_forward_hook(mlp(i)))  # type: ignore[union-attr]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_entropy(
    attention: SoftmaxAttention, x_TD: Tensor, packing: Packing, cos_sin: tuple[Tensor, Tensor]
) -> float:
    """Mean over heads and tokens of H(p) / log n, where p is the distribution over the n ≥ 2 tokens that a token can
    read."""
    q_THC, k_TKC, _ = attention.project(x_TD, packing, cos_sin)
    position_L = torch.arange(packing.max_len, device=x_TD.device)
    allowed_LL = position_L <= position_L[:, None]
    if attention.pattern is not None:
        allowed_LL = attention.pattern.allowed(position_L[:, None], position_L)
    shares = []
    for q, k in zip(q_THC.split(packing.lengths), k_TKC.split(packing.lengths)):
        length = len(q)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores_HLL = torch.einsum("ihc,jhc->hij", q.float(), k.float()) / math.sqrt(q.shape[-1])
        allowed = allowed_LL[:length, :length]
        p_HLL = scores_HLL.masked_fill(~allowed, -torch.inf).softmax(-1)
        several = allowed.sum(-1) >= 2
        if several.any():
            most_L = allowed.sum(-1)[several].float().log()
            shares.append((torch.special.entr(p_HLL).sum(-1)[:, several] / most_L).flatten())
    return torch.cat(shares).mean().item() if shares else 1.0


def _rms(x: Tensor | None) -> float:
    return 0.0 if x is None else x.detach().float().square().mean().sqrt().item()


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(t.float().square().sum().item() for t in tensors))
