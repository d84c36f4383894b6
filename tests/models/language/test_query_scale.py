"""Softmax attention without, and with other, divisions: against transformers' T5, and log n as in Qwen 1."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from models.language.attention import SoftmaxAttention
from models.language.packing import Packing
from models.language.query_scale import QueryScale
from tests.models.language.policies import DENSE

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
NO_ROTATION = (torch.ones(20, 1, 8), torch.zeros(20, 1, 8))


def against_t5(scaling: str) -> tuple[float, float]:
    """Largest difference to T5's attention with the same weights: outputs, and gradients of input and weights."""
    t5 = T5Config(d_model=64, d_kv=16, num_heads=4, dropout_rate=0.0)
    torch.manual_seed(0)
    oracle = T5Attention(t5, has_relative_attention_bias=False, layer_idx=0).eval()
    ours = SoftmaxAttention(replace(DENSE, num_key_value_heads=4, qk_norm=False, attention_scaling=scaling))
    pairs = [(getattr(ours, f"{name}_proj").weight, getattr(oracle, name).weight) for name in "qkvo"]
    for mine, theirs in pairs:
        mine.data.copy_(theirs)
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    mine, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    output, expected = ours(mine, Packing.of([20]), NO_ROTATION, None), oracle(theirs[None], mask=mask)[0][0]
    for result in (output, expected):
        result.square().sum().div(20).backward()
    gradients = [(mine.grad, theirs.grad), *((a.grad, b.grad) for a, b in pairs)]
    worst = max((a - b).abs().max().item() for a, b in gradients if a is not None and b is not None)
    return (output - expected).abs().max().item(), worst


def test_without_a_division_it_is_t5s_attention() -> None:
    forward, gradients = against_t5("none")
    assert forward <= 1e-5
    assert gradients <= 1e-4
    assert against_t5("sqrt")[0] > 0.01


@pytest.mark.parametrize(("scaling", "divisor"), [("sqrt", 4.0), ("inverse", 16.0), ("none", 1.0)])
def test_what_queries_and_keys_are_divided_by(scaling: str, divisor: float) -> None:
    q_THC = torch.randn(20, 4, 16, generator=torch.Generator().manual_seed(0))
    scaled = QueryScale(replace(DENSE, attention_scaling=scaling), reads_all=True)(q_THC, torch.arange(20))
    torch.testing.assert_close(scaled / math.sqrt(16), q_THC / divisor)  # the kernel's own division included


def test_log_n_is_that_of_qwen() -> None:
    scale = QueryScale(replace(DENSE, log_n_from=8), reads_all=True)
    ours = scale(torch.ones(30, 4, 16), torch.arange(30))[:, 0, 0]
    qwen = torch.tensor([math.log(n, 8) if n > 8 else 1.0 for n in range(1, 31)])
    torch.testing.assert_close(ours, qwen)
    assert torch.equal(
        QueryScale(replace(DENSE, log_n_from=8), reads_all=False)(torch.ones(30, 4, 16), torch.arange(30)),
        torch.ones(30, 4, 16),
    )
