"""The mixture against a float64 loop over tokens and experts, and against the mixtures of transformers."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import Dots1Config, MixtralConfig
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from models.language.dispatch import Dispatch, within_capacity
from models.language.experts import grouped_swiglu, looped_swiglu
from models.language.moe import MixtureOfExperts
from models.language.router import RouterTrace
from tests.models.language.policies import DEEPSEEK, MOE


def mixture(**changes: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MixtureOfExperts(replace(MOE, **changes).validate())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if moe.gate.has_bias:
        moe.gate.e_score_correction_bias.normal_(std=0.3)
    return moe.eval()


def loop(moe: MixtureOfExperts, x_TD: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    w = dict(moe.named_parameters()) | dict(moe.named_buffers())
    router, rows = moe.gate, []
    for x in x_TD:
        logits = w["gate.weight"] @ x
        score = torch.softmax(logits, 0) if router.scoring == "softmax" else 1 / (1 + torch.exp(-logits))
        claim = score + w["gate.e_score_correction_bias"] if router.has_bias else score
        size = len(score) // router.groups
        groups = [range(g * size, (g + 1) * size) for g in range(router.groups)]
        if router.groups > 1:
            count = 2 if router.has_bias else 1
            groups.sort(key=lambda group: -sum(sorted((claim[e].item() for e in group), reverse=True)[:count]))
        open_experts = [e for group in groups[: router.top_groups] for e in group]
        chosen = sorted(open_experts, key=lambda e: -claim[e].item())[: router.top_k]
        weight = {e: score[e] for e in chosen}
        if router.renormalise:
            weight = {e: p / sum(weight.values()) for e, p in weight.items()}
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (w["experts.gate_up_proj"][e] @ x).chunk(2)
            inner = gate / (1 + torch.exp(-gate)) * up
            y = y + router.scaling * weight[e] * (w["experts.down_proj"][e] @ inner)
        if moe.shared_expert is not None:
            gate = w["shared_expert.gate_proj.weight"] @ x
            inner = gate * torch.sigmoid(gate) * (w["shared_expert.up_proj.weight"] @ x)
            shared = w["shared_expert.down_proj.weight"] @ inner
            y = y + (shared if moe.shared_expert_gate is None else torch.sigmoid(moe.shared_expert_gate(x)) * shared)
        rows.append(y)
    return torch.stack(rows)


KINDS = {
    "plain": {},
    "not renormalised": {"norm_topk_prob": False},
    "all experts": {"num_experts_per_tok": 6},
    "gated shared expert": {"shared_expert_intermediate_size": 24},
    "sigmoid": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
    "softmax in groups": {"n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    "deepseek": {
        "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "router_selection_bias": True, "num_experts": 12,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "shared_expert_intermediate_size": 24,
        "shared_expert_gate": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 50])  # with 1 and 3, most experts get no token
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_in_float64(kind: str, tokens: int) -> None:
    moe = mixture(**KINDS[kind])
    x_TD = torch.randn(tokens, 64, requires_grad=True)
    y_TD = moe(x_TD, None)
    (y_TD**2).mean().backward()

    reference = mixture(**KINDS[kind])
    reference.load_state_dict(moe.state_dict())
    reference.double()
    x64_TD = x_TD.detach().double().requires_grad_()
    y64_TD = loop(reference, x64_TD)
    (y64_TD**2).mean().backward()

    assert y64_TD.std() > 0.1
    torch.testing.assert_close(y_TD.double(), y64_TD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_TD.grad.double(), x64_TD.grad, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(moe.parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_equals_the_mixtures_of_transformers() -> None:
    x_TD = torch.randn(50, 64)
    mixtral = MixtralSparseMoeBlock(MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=6))
    ours = mixture(num_experts_per_tok=2)
    mixtral.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x_TD, None), mixtral(x_TD[None])[0], atol=1e-5, rtol=0)

    config = Dots1Config(
        hidden_size=64, moe_intermediate_size=32, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2,
        n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    ours = mixture(**KINDS["deepseek"] | {"shared_expert_intermediate_size": 32})
    dots1 = Dots1MoE(config)
    dots1.load_state_dict(
        {name.replace("shared_expert.", "shared_experts."): w for name, w in ours.state_dict().items()}
    )
    torch.testing.assert_close(ours(x_TD, None), dots1(x_TD[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("swiglu", [grouped_swiglu, looped_swiglu])
def test_grouped_and_looped_experts_have_the_same_gradients(swiglu: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    x_SD, weights_S = torch.randn(40, 16), torch.rand(40)
    w13, w2 = torch.randn(5, 24, 16) / 4, torch.randn(5, 16, 12) / 4
    ends_E = torch.tensor([7, 7, 21, 39, 40], dtype=torch.int32)  # expert 1 has no rows
    inputs = [x.requires_grad_() for x in (x_SD, weights_S, w13, w2)]

    def naive() -> torch.Tensor:
        owner_S = torch.searchsorted(ends_E.long(), torch.arange(40), right=True)
        gate, up = torch.einsum("snd,sd->sn", w13[owner_S], x_SD).chunk(2, -1)
        inner = gate * gate.sigmoid() * up
        return torch.einsum("sdi,si->sd", w2[owner_S], inner) * weights_S[:, None]

    direction = torch.randn(40, 16)
    torch.testing.assert_close(swiglu(x_SD, weights_S, ends_E, w13, w2), naive(), atol=1e-5, rtol=0)
    ours = torch.autograd.grad((swiglu(x_SD, weights_S, ends_E, w13, w2) * direction).sum(), inputs)
    theirs = torch.autograd.grad((naive() * direction).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_capacity_drops_what_weighs_least() -> None:
    experts_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    weights_TK = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.6, 0.4], [0.5, 0.3]])
    # 8 choices, 4 experts: 2 each. Expert 0 is asked for four times and keeps the tokens 1 and 2.
    kept_TK = within_capacity(experts_TK, weights_TK, 4, 1.0)
    assert kept_TK.tolist() == [[False, True], [True, True], [True, True], [False, True]]
    assert within_capacity(experts_TK, weights_TK, 4, 1.5)[:, 0].tolist() == [
        True,
        True,
        True,
        False,
    ]  # a tie: the later
    assert within_capacity(experts_TK, weights_TK, 4, 2.0).all()
    assert within_capacity(experts_TK, weights_TK, 4, 0.01).sum() == 3  # the busy experts keep one each


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.3])
def test_dropped_choices_count_for_nothing(factor: float) -> None:
    moe = mixture(expert_capacity_factor=factor, num_experts_per_tok=3)
    x_TD = torch.randn(40, 64, requires_grad=True)
    free = moe(x_TD, None)
    moe.train()
    trace = RouterTrace()
    y_TD = moe(x_TD, trace)
    (record,) = trace.records
    capacity = math.ceil(factor * 40 * 3 / 6)
    counts = torch.bincount(record.experts_TK[record.kept_TK], minlength=6)
    assert counts.max() == capacity
    assert not record.kept_TK.all()

    _, weights_TK = moe.gate(x_TD)
    every = Dispatch.of(record.experts_TK, 6)
    rows = looped_swiglu(
        x_TD[every.token_S], every.take(weights_TK * record.kept_TK), every.ends_E, *moe.experts.parameters()
    )
    expected = rows[every.row_TK].sum(1)
    torch.testing.assert_close(y_TD, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(y_TD, free, atol=1e-3)
    inputs = [x_TD, *moe.parameters()]
    ours = torch.autograd.grad(y_TD.square().mean(), inputs, retain_graph=True)
    theirs = torch.autograd.grad(expected.square().mean(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_replay_takes_the_given_experts_and_the_routers_own_weights() -> None:
    moe = mixture(**KINDS["deepseek"])
    x_TD = torch.randn(20, 64)
    own = RouterTrace()
    expected = moe(x_TD, own)
    torch.testing.assert_close(moe(x_TD, RouterTrace(own.records[0].experts_TK[:, None])), expected, atol=0, rtol=0)

    other_TLK = torch.stack([torch.randperm(12)[:4] for _ in range(20)])[:, None]
    trace = RouterTrace(other_TLK)
    y_TD = moe(x_TD, trace)
    assert torch.equal(trace.records[0].experts_TK, other_TLK[:, 0])
    score_TK = torch.sigmoid(x_TD @ moe.gate.weight.T).gather(1, other_TLK[:, 0])
    weights_TK = 2.5 * score_TK / score_TK.sum(-1, keepdim=True)
    expected = moe.experts(x_TD, other_TLK[:, 0], weights_TK) + moe.shared_expert(x_TD)
    torch.testing.assert_close(y_TD, expected, atol=1e-5, rtol=1e-5)
    y_TD.sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0


def test_the_selection_bias_stays_float32() -> None:
    moe = MixtureOfExperts(DEEPSEEK)
    moe.gate.e_score_correction_bias.fill_(1.001)
    moe.to(torch.bfloat16)
    assert moe.gate.weight.dtype == torch.bfloat16
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert moe.gate.e_score_correction_bias[0] == torch.tensor(1.001)
