"""The mixture against a float64 loop over tokens and experts, and its losses against transformers."""

from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from models.language.moe import MixtureOfExperts, RouterRecord, expert_load, load_balancing_loss, router_z_loss
from tests.models.language.policies import MOE


def mixture(**changes: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MixtureOfExperts(replace(MOE, **changes).validate())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return moe


def loop(moe: MixtureOfExperts, x_TD: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    w = dict(moe.named_parameters())
    rows = []
    for x in x_TD:
        probability = torch.softmax(w["gate.weight"] @ x, 0)
        chosen = sorted(range(len(probability)), key=lambda e: -probability[e])[: moe.gate.top_k]
        weight = {e: probability[e] for e in chosen}
        if moe.gate.renormalise:
            weight = {e: p / sum(weight.values()) for e, p in weight.items()}
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (w["experts.gate_up_proj"][e] @ x).chunk(2)
            y = y + weight[e] * (w["experts.down_proj"][e] @ (gate / (1 + torch.exp(-gate)) * up))
        if moe.shared_expert is not None:
            gate = w["shared_expert.gate_proj.weight"] @ x
            inner = gate * torch.sigmoid(gate) * (w["shared_expert.up_proj.weight"] @ x)
            y = y + torch.sigmoid(w["shared_expert_gate.weight"] @ x) * (w["shared_expert.down_proj.weight"] @ inner)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 3, 50])  # with 1 and 3, most experts get no token
@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_topk_prob": False}, {"num_experts_per_tok": 6}, {"shared_expert_intermediate_size": 24}],
    ids=["plain", "not renormalised", "all experts", "shared"],
)
def test_equals_a_loop_in_float64(changes: dict, tokens: int) -> None:
    moe = mixture(**changes)
    x_TD = torch.randn(tokens, 64, requires_grad=True)
    y_TD = moe(x_TD, None)
    (y_TD**2).mean().backward()

    reference = mixture(**changes).double()
    reference.load_state_dict(moe.state_dict())
    x64_TD = x_TD.detach().double().requires_grad_()
    y64_TD = loop(reference, x64_TD)
    (y64_TD**2).mean().backward()

    assert y64_TD.std() > 0.1
    torch.testing.assert_close(y_TD.double(), y64_TD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_TD.grad.double(), x64_TD.grad, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(moe.parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_balancing_loss_equals_that_of_transformers() -> None:
    """theirs counts a token once for each of its k experts, so it is k times ours."""
    logits_TE = torch.randn(200, 6) * 2
    record = RouterRecord(logits_TE, logits_TE.topk(2).indices)
    theirs = load_balancing_loss_func((logits_TE,), num_experts=6, top_k=2)
    torch.testing.assert_close(load_balancing_loss([record]) * 2, theirs)
    uniform = RouterRecord(torch.zeros(6, 6), torch.arange(6)[:, None])
    assert load_balancing_loss([uniform]).item() == pytest.approx(1.0)
    torch.testing.assert_close(load_balancing_loss([record, uniform]), (theirs / 2 + 1) / 2)


def test_balancing_loss_pulls_the_router_to_balance() -> None:
    torch.manual_seed(0)
    logits_TE = (torch.randn(300, 6) + torch.arange(6.0)).requires_grad_()
    optimizer = torch.optim.SGD([logits_TE], lr=30.0)

    def record() -> RouterRecord:
        return RouterRecord(logits_TE, logits_TE.topk(2).indices)

    before = expert_load([record()])
    for _ in range(300):
        optimizer.zero_grad()
        load_balancing_loss([record()]).backward()
        optimizer.step()
    after = expert_load([record()])
    assert after["max_violation"] < 0.5 < before["max_violation"]
    assert after["load_entropy"] > before["load_entropy"]


def test_z_loss() -> None:
    zero = RouterRecord(torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int64))
    large = RouterRecord(torch.full((4, 8), 10.0), zero.experts_TK)
    log8 = torch.tensor(8.0).log()
    torch.testing.assert_close(router_z_loss([zero]), log8**2)
    torch.testing.assert_close(router_z_loss([zero, large]), (log8**2 + (log8 + 10) ** 2) / 2)


def test_expert_load() -> None:
    logits_TE = torch.zeros(4, 4)
    even = RouterRecord(logits_TE, torch.arange(4)[:, None])
    collapsed = RouterRecord(logits_TE, torch.zeros(4, 1, dtype=torch.int64))
    assert expert_load([even]) == pytest.approx({"max_violation": 0.0, "load_entropy": 1.0})
    assert expert_load([collapsed]) == pytest.approx({"max_violation": 3.0, "load_entropy": 0.0})
    assert expert_load([even, collapsed]) == pytest.approx({"max_violation": 1.5, "load_entropy": 0.5})
