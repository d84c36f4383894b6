"""What `inspect` measures, against the same figures got another way."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.language.attention import SoftmaxAttention
from models.language.decoder import Decoder
from models.language.inspection import attention_entropy, inspect_model
from models.language.packing import Packing
from models.language.rope import rotation
from tests.models.language.policies import DENSE, HYBRID, POLICIES, SPARSE, made

TOKENS = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(0))
PACKING = Packing.of([40, 20])


def test_figures_are_those_of_the_passes_themselves() -> None:
    model = Decoder(HYBRID).init_weights(0)
    streams = [model.embed_tokens(TOKENS)]
    cos_sin = rotation(model.rope_frequency, PACKING.positions_T, torch.float32)
    for layer in model.layers:
        streams.append(layer(streams[-1], PACKING, cos_sin, None, None))
        streams[-1].retain_grad()
    logits_TV = model.logits(model.norm(streams[-1]))
    predicting = [t for t in range(60) if t not in (39, 59)]
    loss = nn.functional.cross_entropy(logits_TV[predicting], TOKENS[[t + 1 for t in predicting]])
    loss.backward()

    found = inspect_model(Decoder(HYBRID).init_weights(0), TOKENS, PACKING, lr=1e-3)
    assert found.loss == pytest.approx(loss.item(), abs=1e-5)
    assert found.embedding == pytest.approx(streams[0].square().mean().sqrt().item(), rel=1e-5)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    for layer, stream in zip(found.layers, streams[1:], strict=True):
        assert layer.stream == pytest.approx(stream.square().mean().sqrt().item(), rel=1e-5)
        assert layer.gradient == pytest.approx(stream.grad.square().mean().sqrt().item() * 60, rel=1e-3)
    assert [layer.entropy is None for layer in found.layers] == [True, False, True]


def test_the_effective_rate_of_adams_first_step() -> None:
    """Every entry moves by lr, so ‖ΔW‖ / ‖W‖ is lr over the RMS of the weights."""
    model = Decoder(DENSE).init_weights(0)
    matrices = torch.cat([p.flatten() for p in model.layers[1].parameters() if p.dim() > 1])
    expected = 1e-3 / matrices.detach().square().mean().sqrt().item()
    found = inspect_model(model, TOKENS, PACKING, lr=1e-3)
    assert found.layers[1].rate == pytest.approx(expected, rel=1e-3)
    wide = replace(DENSE, parametrization="mup", base_hidden_size=16)  # the rate falls by 4, the weights by √4
    assert inspect_model(Decoder(wide).init_weights(0), TOKENS, PACKING, lr=1e-3).layers[1].rate == pytest.approx(
        expected / 2, rel=1e-2
    )


@pytest.mark.parametrize("name", POLICIES)
def test_every_kind_of_model_can_be_inspected(name: str) -> None:
    found = inspect_model(made(POLICIES[name]), TOKENS, PACKING, lr=1e-3)
    for layer in found.layers:
        assert min(layer.stream, layer.attention, layer.gradient, layer.weight_gradient, layer.rate, layer.moved) > 0
        assert layer.entropy is None or 0 < layer.entropy < 1
    assert math.isfinite(found.loss)


@torch.no_grad()
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["full", "sliding"])
def test_uniform_attention_has_all_the_entropy(config: object) -> None:
    attention = Decoder(config).init_weights(0).layers[0].self_attn
    assert isinstance(attention, SoftmaxAttention)
    x_TD = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    cos_sin = (torch.ones(60, 1, 8), torch.zeros(60, 1, 8))
    assert 0.2 < attention_entropy(attention, x_TD, PACKING, cos_sin) < 0.95
    attention.q_norm.weight.zero_()
    assert attention_entropy(attention, x_TD, PACKING, cos_sin) == pytest.approx(1.0, abs=1e-5)
    attention.q_norm.weight.fill_(1e3)
    assert attention_entropy(attention, x_TD, PACKING, cos_sin) < 0.01
