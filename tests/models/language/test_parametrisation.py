"""Width: how far a few steps of Adam move the hidden states of narrow and wide models."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.packing import Packing
from models.language.parametrisation import head_multiplier, learning_rate_multipliers
from tests.models.language.policies import DENSE, MOE

WIDTHS = (64, 128, 256, 512)


def of_width(width: int, parametrization: str) -> LanguageConfig:
    return LanguageConfig(
        vocab_size=64, hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 16,
        num_key_value_heads=width // 16, head_dim=16, intermediate_size=2 * width, initializer="lecun",
        parametrization=parametrization, base_hidden_size=64, tie_word_embeddings=False,
    )  # fmt: skip


def change(width: int, parametrization: str) -> float:
    """RMS of what three steps add to the final hidden states."""
    model = Decoder(of_width(width, parametrization)).init_weights(0)
    rates = learning_rate_multipliers(model)
    groups = [{"params": [p], "lr": 1e-4 * rates.get(name, 1.0)} for name, p in model.named_parameters()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    tokens_T = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(0))
    packing = Packing.of([64])
    states = []
    handle = model.layers[-1].register_forward_hook(lambda module, inputs, output: states.append(output.detach()))
    for _ in range(4):
        logits_TV = model.logits(model(tokens_T, packing))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:]).backward()
        optimizer.step()
    handle.remove()
    return (states[-1] - states[0]).square().mean().sqrt().item()


def slope(parametrization: str) -> float:
    """Exponent of the width in the change: least squares over doublings."""
    x = torch.tensor([math.log2(width) for width in WIDTHS])
    y = torch.tensor([math.log2(change(width, parametrization)) for width in WIDTHS])
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def test_coordinate_check() -> None:
    """Yang et al. 2022, appendix D.1: by small steps hidden states move as width^1, as width^½, and not at all."""
    standard, ntk, mup = (slope(name) for name in ("standard", "ntk", "mup"))
    assert standard == pytest.approx(1.0, abs=0.25)
    assert ntk == pytest.approx(0.5, abs=0.2)
    assert mup == pytest.approx(0.0, abs=0.15)


@pytest.mark.parametrize("parametrization", ["mup", "ntk"])
def test_all_agree_at_the_base_width(parametrization: str) -> None:
    config = replace(MOE, parametrization=parametrization, base_hidden_size=64)
    ours, plain = Decoder(config).init_weights(0), Decoder(MOE).init_weights(0)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))
    assert learning_rate_multipliers(ours) == {}
    assert head_multiplier(config) == 1.0


@pytest.mark.parametrize("initializer", ["truncated_normal", "lecun", "xavier"])
def test_what_keeps_its_scale_and_what_does_not(initializer: str) -> None:
    """From width 64 to 1024, 16 times as wide: σ of hidden matrices falls by 4, of the embedding not at all."""
    scale = {}
    for width in (64, 1024):
        config = replace(of_width(width, "mup"), initializer=initializer, vocab_size=width)
        model = Decoder(config).init_weights(0)
        scale[width] = {name: p.std().item() for name, p in model.named_parameters() if p.dim() > 1}
    for name, narrow in scale[64].items():
        assert narrow / scale[1024][name] == pytest.approx(
            1.0 if name.startswith(("embed", "lm_head")) else 4.0, rel=0.05
        ), name


def test_rates_of_muP() -> None:
    model = Decoder(replace(DENSE, parametrization="mup", base_hidden_size=16))
    rates = learning_rate_multipliers(model)
    assert set(rates.values()) == {0.25}
    assert "layers.0.self_attn.q_proj.weight" in rates
    assert not {"embed_tokens.weight", "lm_head.weight", "norm.weight"} & rates.keys()
    assert not any("norm" in name for name in rates)


def test_a_folded_multiplier_is_a_multiplier() -> None:
    """NTK: y = W x / √n with σ(W) = 1 learns as w x with w = W / √n and a rate smaller by √n does, under Adam."""
    n = 64
    torch.manual_seed(0)
    x, target = torch.randn(32, n), torch.randn(32, 1)
    unit = [nn.Parameter(torch.randn(n, n)), nn.Parameter(torch.randn(1, n))]
    folded = [nn.Parameter(w.detach() / math.sqrt(n)) for w in unit]

    def train(weights: list[nn.Parameter], multiplier: float, rate: float) -> torch.Tensor:
        adam = torch.optim.Adam(weights, lr=rate, eps=0.0)
        for _ in range(10):
            y = torch.tanh(x @ weights[0].T * multiplier) @ weights[1].T * multiplier
            adam.zero_grad()
            (y - target).square().mean().backward()
            adam.step()
        return y.detach()

    start = train([nn.Parameter(w.detach().clone()) for w in folded], 1.0, 0.0)
    expected = train(unit, 1 / math.sqrt(n), 0.01)
    assert (expected - start).abs().max() > 0.1
    torch.testing.assert_close(train(folded, 1.0, 0.01 / math.sqrt(n)), expected, atol=1e-4, rtol=0)
