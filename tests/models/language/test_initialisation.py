"""Initial weights against torch.nn.init, transformers' T5 and what the papers promise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.packing import Packing
from tests.models.language.policies import DENSE, MOE

WIDE = replace(DENSE, hidden_size=256, num_attention_heads=8, num_key_value_heads=4, head_dim=48, intermediate_size=512)
LAYER = "layers.1."
TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(0))


def weights(config: LanguageConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in Decoder(config).init_weights(seed).named_parameters()}


def test_the_default_draws_what_it_always_drew() -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in weights(MOE, seed=5).items():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        std = 0.2 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.2
        expected = nn.init.trunc_normal_(
            torch.empty(parameter.shape), std=std, a=-3 * std, b=3 * std, generator=generator
        )
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    ("scheme", "draw"),
    [
        ("xavier", nn.init.xavier_normal_),
        ("he", nn.init.kaiming_normal_),
        ("lecun", lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear")),
    ],
)
def test_standard_deviations_are_those_of_torch(scheme: str, draw: object) -> None:
    for name, weight in weights(replace(WIDE, initializer=scheme)).items():
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(draw(torch.empty(weight.shape)).std().item(), rel=0.03), name
            assert weight.mean().abs() < 0.01


def test_orthogonal_matrices_keep_lengths() -> None:
    for weight in weights(replace(WIDE, initializer="orthogonal")).values():
        if weight.ndim == 2:
            short = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)), atol=1e-5, rtol=0)


def test_each_expert_is_a_matrix_of_its_own() -> None:
    wide = replace(MOE, hidden_size=128, moe_intermediate_size=64, initializer="xavier")
    drawn = weights(wide)
    for matrix in (*drawn[f"{LAYER}mlp.experts.gate_up_proj"].flatten(0, 1).view(-1, 64, 128),):
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / (64 + 128)), rel=0.06)
    orthogonal = weights(replace(wide, initializer="orthogonal"))[f"{LAYER}mlp.experts.gate_up_proj"]
    for expert in orthogonal:
        for matrix in expert.chunk(2):  # gate and up
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), atol=1e-5, rtol=0)


def test_t5_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=97, d_model=256, d_kv=48, num_heads=8, d_ff=512, num_layers=2, feed_forward_proj="gated-silu",
        tie_word_embeddings=False,
    )  # fmt: skip
    oracle = dict(T5ForConditionalGeneration(shape).named_parameters())
    config = replace(WIDE, num_key_value_heads=8, initializer="t5", attention_scaling="none", qk_norm=False)
    drawn = weights(config)
    block = "decoder.block.1.layer."
    for ours, theirs in {
        f"{LAYER}self_attn.q_proj.weight": f"{block}0.SelfAttention.q.weight",
        f"{LAYER}self_attn.k_proj.weight": f"{block}0.SelfAttention.k.weight",
        f"{LAYER}self_attn.v_proj.weight": f"{block}0.SelfAttention.v.weight",
        f"{LAYER}self_attn.o_proj.weight": f"{block}0.SelfAttention.o.weight",
        f"{LAYER}mlp.gate_proj.weight": f"{block}2.DenseReluDense.wi_0.weight",
        f"{LAYER}mlp.down_proj.weight": f"{block}2.DenseReluDense.wo.weight",
        "embed_tokens.weight": "shared.weight",
    }.items():
        assert drawn[ours].shape == oracle[theirs].shape
        assert drawn[ours].std().item() == pytest.approx(oracle[theirs].std().item(), rel=0.03), ours


def logit_std(config: LanguageConfig) -> float:
    """Standard deviation of attention logits for inputs of unit variance."""
    attention = Decoder(config).init_weights(0).layers[0].self_attn
    x_TD = torch.randn(500, config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        q, k = (
            proj(x_TD).unflatten(-1, (config.num_attention_heads, -1)) for proj in (attention.q_proj, attention.k_proj)
        )
        q = attention.query_scale(q, torch.arange(500)) / math.sqrt(config.head_dim)
        return torch.einsum("ihc,jhc->hij", q, k).std().item()


@pytest.mark.parametrize("size", [16, 64, 144])
def test_why_one_over_root_d_and_how_t5_does_without(size: int) -> None:
    config = replace(WIDE, num_key_value_heads=8, head_dim=size, qk_norm=False)
    assert logit_std(replace(config, initializer="lecun")) == pytest.approx(1.0, rel=0.1)
    assert logit_std(replace(config, initializer="t5", attention_scaling="none")) == pytest.approx(1.0, rel=0.1)
    assert logit_std(replace(config, initializer="lecun", attention_scaling="none")) == pytest.approx(
        math.sqrt(size), rel=0.1
    )


def test_deepnorm_shrinks_values_outputs_and_the_feed_forward() -> None:
    drawn, plain = (weights(replace(WIDE, norm_placement="deepnorm", initializer=s)) for s in ("deepnorm", "xavier"))
    for name in drawn:
        if drawn[name].ndim == 2:
            small = any(part in name for part in ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
            expected = (8 * 3) ** -0.25 if small else 1.0
            assert (drawn[name].std() / plain[name].std()).item() == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("scheme", ["fixup", "lecun"])
def test_without_norms_the_layers_start_as_the_identity(scheme: str) -> None:
    model = Decoder(replace(DENSE, norm_placement="none", initializer=scheme)).init_weights(0)
    with torch.no_grad():
        assert torch.equal(model(TOKENS, Packing.of([40])), model.embed_tokens(TOKENS))
    model.logits(model(TOKENS, Packing.of([40]))).log_softmax(-1)[:, 3].mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    if scheme == "fixup":
        assert learning == {"lm_head.weight"}  # all else waits for it
    else:  # ReZero: the gates move first
        assert {name for name in learning if "layers" in name} == {
            f"layers.{i}.{branch}_residual.gate" for i in range(3) for branch in ("attention", "mlp")
        }


def first_step_change(layers: int) -> float:
    """How far one step of SGD moves a model with Fixup, its head drawn and not 0."""
    config = replace(DENSE, num_hidden_layers=layers, norm_placement="none", initializer="fixup", qk_norm=False)
    model = Decoder(config).init_weights(0)
    nn.init.normal_(model.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    before = model.logits(model(TOKENS, Packing.of([40])))
    nn.functional.cross_entropy(before[:-1], TOKENS[1:]).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        return (model.logits(model(TOKENS, Packing.of([40]))) - before).std().item()


def test_fixups_first_step_does_not_grow_with_depth() -> None:
    """The paper's promise: a step of size η changes the function by Θ(η), whatever the depth."""
    assert first_step_change(32) / first_step_change(4) == pytest.approx(1.0, abs=0.3)
