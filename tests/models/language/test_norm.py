"""Norms against torch's, and where each placement has them."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.language.config import LanguageConfig
from models.language.decoder import Decoder, DecoderLayer
from models.language.norm import LayerNorm, RMSNorm, deepnorm_alpha, deepnorm_beta
from models.language.packing import Packing
from models.language.rope import rotation
from tests.models.language.layer_oracles import differences
from tests.models.language.policies import DENSE

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_norms_are_torchs(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    mine, oracle = ours(64, 1e-6), theirs(64, eps=1e-6)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.normal_()
    oracle.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(X), oracle(X), atol=1e-6, rtol=0)


def decoder(placement: str, layers: int = 3, **changes: object) -> Decoder:
    model = Decoder(replace(DENSE, norm_placement=placement, num_hidden_layers=layers, **changes)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("gate"):
                parameter.add_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    return model


EQUATIONS = {
    "pre": lambda x, f, n, r: x + f(n(x)),
    "post": lambda x, f, n, r: n(x + f(x)),
    "sandwich": lambda x, f, n, r: x + r.outer_norm(f(n(x))),
    "deepnorm": lambda x, f, n, r: n((2 * 3) ** 0.25 * x + f(x)),
    "none": lambda x, f, n, r: x + r.gate * f(x),
}


@torch.no_grad()
def from_its_equation(placement: str, norm_type: str) -> float:
    """Largest difference between a layer and its equation in float64."""
    model = decoder(placement, norm_type=norm_type)
    exact, packing = copy.deepcopy(model).double().layers[1], Packing.of([20])
    cos_sin = rotation(model.rope_frequency, packing.positions_T, torch.float64)
    equation = EQUATIONS[placement]
    h = equation(
        X.double(),
        lambda x_TD: exact.self_attn(x_TD, packing, cos_sin, None),
        exact.input_layernorm,
        exact.attention_residual,
    )
    expected = equation(h, exact.mlp, exact.post_attention_layernorm, exact.mlp_residual)
    ours = model.layers[1](X, packing, tuple(x.float() for x in cos_sin), None, None)
    return (ours - expected).abs().max().item()


@pytest.mark.parametrize("placement", EQUATIONS)
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_layer_is_its_equation(placement: str, norm_type: str) -> None:
    assert from_its_equation(placement, norm_type) <= 1e-5
    model = decoder(placement, norm_type=norm_type)
    layer = model.layers[1]
    assert isinstance(layer, DecoderLayer)
    kinds = {type(layer.input_layernorm), type(layer.post_attention_layernorm)}
    assert kinds == {nn.Identity if placement == "none" else LayerNorm if norm_type == "layer_norm" else RMSNorm}
    assert isinstance(model.norm, nn.Identity) == (placement not in ("pre", "sandwich"))


@pytest.mark.parametrize("kind", ["pre", "post", "sandwich"])
def test_a_layer_is_that_of_torch_or_gemma(kind: str) -> None:
    forward, gradients = differences(kind)
    assert forward <= 1e-5
    assert gradients <= 1e-4


def test_deepnorms_coefficients() -> None:
    """Decoder-only, as published for its 12, 24 and 1000 layers (figure 2: (2M)^(1/4) and (8M)^(-1/4))."""
    assert deepnorm_alpha(12) == pytest.approx(2.2134, abs=1e-4)
    assert deepnorm_beta(12) == pytest.approx(0.3195, abs=1e-4)
    assert deepnorm_alpha(1000) == pytest.approx(6.6874, abs=1e-4)
    assert deepnorm_beta(1000) == pytest.approx(0.1057, abs=1e-4)


def last_gradient(placement: str, layers: int) -> float:
    """Norm of the loss gradient at the last layer's down_proj, averaged over five models."""
    shape = LanguageConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, intermediate_size=128, norm_placement=placement, initializer="xavier", tie_word_embeddings=False,
    )  # fmt: skip
    total = 0.0
    for seed in range(5):
        model = Decoder(shape).init_weights(seed)
        tokens_T = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(seed))
        logits_TV = model.logits(model(tokens_T, Packing.of([64])))
        nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:]).backward()
        total += model.layers[-1].mlp.down_proj.weight.grad.norm().item() / 5
    return total


def test_gradients_of_the_last_layer_follow_xiong_et_al() -> None:
    """Theorem 1: independent of the depth in post-norm, falling as 1/√L in pre-norm: why post-norm needs a warm-up."""
    post, pre = (last_gradient(kind, 2) / last_gradient(kind, 8) for kind in ("post", "pre"))
    assert post == pytest.approx(1.0, abs=0.2)
    assert pre == pytest.approx(math.sqrt(8 / 2), rel=0.3)
