"""The balancing losses against transformers and by hand, the selection bias at work, and the load figures."""

from dataclasses import replace

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from models.language.balancing import (
    ExpertLoad,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    update_selection_bias,
)
from models.language.router import Router, RouterRecord
from tests.models.language.policies import DEEPSEEK


def test_balancing_loss_equals_that_of_transformers() -> None:
    """theirs counts a token once for each of its k experts, so it is k times ours."""
    logits_TE = torch.randn(200, 6) * 2
    record = RouterRecord(logits_TE, logits_TE.topk(2).indices)
    theirs = load_balancing_loss_func((logits_TE,), num_experts=6, top_k=2)
    torch.testing.assert_close(load_balancing_loss([record]) * 2, theirs)
    uniform = RouterRecord(torch.zeros(6, 6), torch.arange(6)[:, None])
    assert load_balancing_loss([uniform]).item() == pytest.approx(1.0)
    torch.testing.assert_close(load_balancing_loss([record, uniform]), (theirs / 2 + 1) / 2)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_balancing_within_each_sequence(scoring: str) -> None:
    """Each sequence by itself, as a sum over experts and tokens; two skewed sequences that balance each other do not
    count as balanced."""
    lengths = (5, 30)
    records = [RouterRecord(x, x.topk(2).indices, scoring) for x in torch.randn(2, 35, 6)]
    expected = []
    for record in records:
        for logits, chosen in zip(record.logits_TE.split(lengths), record.experts_TK.split(lengths), strict=True):
            score = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, True)
            share = [6 / (2 * len(logits)) * (chosen == e).sum() for e in range(6)]
            expected.append(sum(share[e] * score[:, e].sum() / len(logits) for e in range(6)))
    sequence_T = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    loss = sequence_balancing_loss(records, sequence_T, 2)
    torch.testing.assert_close(loss, torch.stack(expected).mean())

    skewed = RouterRecord(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([[0], [1]]))
    assert load_balancing_loss([skewed]).item() == pytest.approx(1.0)
    assert sequence_balancing_loss([skewed], torch.arange(2), 2).item() > 1.9


def test_balancing_loss_pulls_the_router_to_balance() -> None:
    torch.manual_seed(0)
    logits_TE = (torch.randn(300, 6) + torch.arange(6.0)).requires_grad_()
    optimizer = torch.optim.SGD([logits_TE], lr=30.0)

    def record() -> RouterRecord:
        return RouterRecord(logits_TE, logits_TE.topk(2).indices)

    before = ExpertLoad.of([record()]).metrics()
    for _ in range(300):
        optimizer.zero_grad()
        load_balancing_loss([record()]).backward()
        optimizer.step()
    after = ExpertLoad.of([record()]).metrics()
    assert after["max_violation"] < 0.5 < before["max_violation"]
    assert after["load_entropy"] > before["load_entropy"]


def test_the_selection_bias_balances_without_a_gradient() -> None:
    """A router that prefers some experts: the bias levels the load; the weights still come from the scores alone."""
    torch.manual_seed(0)
    router = Router(replace(DEEPSEEK, n_group=1, topk_group=1))
    torch.nn.init.normal_(router.weight, std=0.1)
    x_TD = torch.randn(500, DEEPSEEK.hidden_size) + 1.0
    record, _ = router(x_TD)
    before = ExpertLoad.of([record])
    update_selection_bias([router], before, 0.01)
    step_E = (before.chosen_LE[0] < before.chosen_LE.double().mean()).double() * 2 - 1
    torch.testing.assert_close(router.e_score_correction_bias, (0.01 * step_E).float())
    for _ in range(200):
        record, _ = router(x_TD)
        update_selection_bias([router], ExpertLoad.of([record]), 0.003)
    record, weights_TK = router(x_TD)
    after = ExpertLoad.of([record])
    assert after.metrics()["max_violation"] < 0.2 < before.metrics()["max_violation"]
    score_TK = record.logits_TE.sigmoid().gather(1, record.experts_TK)
    expected_TK = DEEPSEEK.routed_scaling_factor * score_TK / score_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(weights_TK, expected_TK)


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
    full = replace(collapsed, kept_TK=torch.tensor([[True], [False], [False], [False]]))

    def figures(*records: RouterRecord) -> list[float]:
        return [*ExpertLoad.of(records).metrics().values()]

    assert list(ExpertLoad.of([even]).metrics()) == ["max_violation", "load_entropy", "dropped_share"]
    assert figures(even) == pytest.approx([0, 1, 0])
    assert figures(collapsed) == pytest.approx([3, 0, 0])
    assert figures(full) == pytest.approx([3, 0, 0.75])
    assert figures(even, full) == pytest.approx([1.5, 0.5, 0.375])
    both = ExpertLoad.of([even]) + ExpertLoad.of([collapsed])  # two packs through one layer
    assert both.chosen_LE.tolist() == [[5, 1, 1, 1]]
    assert (ExpertLoad() + ExpertLoad.of([])).metrics() == {}
