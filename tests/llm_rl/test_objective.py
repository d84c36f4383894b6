"""Objectives against gradients derived by hand and by autograd of the squared surrogate."""

import math

import pytest
import torch

from llm_rl.objective import OBJECTIVES, PolicyBatch, advantages, importance_weight, mirror_descent, mismatch

SEQUENCE_N = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
REWARDS = [1.0, 0.0, 1.0, 0.0]
TAU = 0.3


def make_batch(delta_scale: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, PolicyBatch]:
    generator = torch.Generator().manual_seed(seed)
    reference_N = -torch.rand(10, generator=generator, dtype=torch.float64)
    logprobs_N = reference_N + delta_scale * torch.randn(10, generator=generator, dtype=torch.float64)
    logprobs_N.requires_grad_()
    advantage_S = torch.tensor(advantages(REWARDS, "mirror_descent"), dtype=torch.float64)
    return logprobs_N, PolicyBatch(logprobs_N, reference_N, reference_N, SEQUENCE_N, advantage_S, denominator=4)


def gradient(loss: torch.Tensor, wrt: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, wrt)[0]


def test_mirror_descent_is_the_gradient_of_the_squared_surrogate() -> None:
    logprobs_N, batch = make_batch()
    delta_S = torch.zeros(4, dtype=torch.float64).index_add(0, SEQUENCE_N, logprobs_N - batch.reference_N)
    surrogate = ((batch.advantage_S - TAU * delta_S) ** 2).mean() / (2 * TAU)
    expected = gradient(surrogate, logprobs_N)
    actual = gradient(mirror_descent(batch, torch.ones(10, dtype=torch.float64), TAU), logprobs_N)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_mirror_descent_at_the_reference_is_reinforce_with_a_mean_baseline() -> None:
    logprobs_N, batch = make_batch(delta_scale=0.0)
    actual = gradient(mirror_descent(batch, torch.ones(10, dtype=torch.float64), TAU), logprobs_N)
    mean = sum(REWARDS) / 4
    by_hand = torch.tensor([-(REWARDS[s] - mean) / 4 for s in SEQUENCE_N.tolist()], dtype=torch.float64)
    torch.testing.assert_close(actual, by_hand, atol=1e-12, rtol=0)


def test_mirror_descent_rests_where_delta_is_advantage_over_tau() -> None:
    _, batch = make_batch()
    lengths_S = torch.bincount(SEQUENCE_N)
    shift_N = (batch.advantage_S / TAU / lengths_S)[SEQUENCE_N]
    at_rest = (batch.reference_N + shift_N).requires_grad_()
    resting = PolicyBatch(at_rest, batch.reference_N, batch.sampler_N, SEQUENCE_N, batch.advantage_S, 4)
    weight_N = torch.ones(10, dtype=torch.float64)
    assert gradient(mirror_descent(resting, weight_N, TAU), at_rest).abs().max() < 1e-12
    elsewhere = (batch.reference_N + 1.1 * shift_N).requires_grad_()
    moving = PolicyBatch(elsewhere, batch.reference_N, batch.sampler_N, SEQUENCE_N, batch.advantage_S, 4)
    assert gradient(mirror_descent(moving, weight_N, TAU), elsewhere).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mirror_descent", "rloo"])
def test_mirror_descent_weights_the_pull_of_each_token(name: str) -> None:
    logprobs_N, batch = make_batch(delta_scale=0.3)
    weight_N = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    delta = [0.0] * 4
    for n, s in enumerate(SEQUENCE_N.tolist()):
        delta[s] += (logprobs_N[n] - batch.reference_N[n]).item()
    by_hand = [-float(weight_N[n]) * (batch.advantage_S[s] - TAU * delta[s]) / 4 for n, s in enumerate(SEQUENCE_N)]
    actual = gradient(OBJECTIVES[name](batch, weight_N, TAU), logprobs_N)
    torch.testing.assert_close(actual, torch.stack(by_hand), atol=1e-12, rtol=0)


def test_grpo_weights_the_surrogate_of_each_token() -> None:
    logprobs_N, batch = make_batch(delta_scale=0.3)
    weight_N = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    lengths = [3, 2, 1, 4]
    by_hand = []
    for n, s in enumerate(SEQUENCE_N.tolist()):
        ratio, advantage = math.exp((logprobs_N[n] - batch.reference_N[n]).item()), batch.advantage_S[s].item()
        clipped = ratio > 1.28 if advantage > 0 else ratio < 0.8
        by_hand.append(0.0 if clipped else -float(weight_N[n]) * ratio * advantage / lengths[s] / 4)
    assert 0 < by_hand.count(0.0) < 10
    actual = gradient(OBJECTIVES["grpo"](batch, weight_N, TAU), logprobs_N)
    torch.testing.assert_close(actual, torch.tensor(by_hand, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rest_imitates_what_was_kept_whatever_the_sampler() -> None:
    logprobs_N, batch = make_batch()
    weight_N = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    actual = gradient(OBJECTIVES["rest"](batch, weight_N, TAU), logprobs_N)
    torch.testing.assert_close(actual, -batch.advantage_S[SEQUENCE_N] / 4, atol=1e-12, rtol=0)


def test_microbatches_of_one_step_add_up() -> None:
    logprobs_N, batch = make_batch()
    ones = torch.ones(10, dtype=torch.float64)
    whole = gradient(mirror_descent(batch, ones, TAU), logprobs_N)
    first_N = SEQUENCE_N < 2
    parts = []
    for keep_N, offset in ((first_N, 0), (~first_N, 2)):
        part = PolicyBatch(
            logprobs_N[keep_N],
            batch.reference_N[keep_N],
            batch.sampler_N[keep_N],
            SEQUENCE_N[keep_N] - offset,
            batch.advantage_S[offset : offset + 2],
            denominator=4,
        )
        parts.append(gradient(mirror_descent(part, ones[keep_N], TAU), logprobs_N))
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_raises_good_and_lowers_or_leaves_bad_sequences(name: str) -> None:
    logprobs_N, batch = make_batch(delta_scale=0.0)
    values = torch.tensor(advantages(REWARDS, name), dtype=torch.float64)
    batch = PolicyBatch(logprobs_N, batch.reference_N, batch.sampler_N, SEQUENCE_N, values, 4)
    ascent_N = -gradient(OBJECTIVES[name](batch, torch.ones(10, dtype=torch.float64), 0.0), logprobs_N)
    good_N = torch.tensor([REWARDS[s] == 1.0 for s in SEQUENCE_N.tolist()])
    assert (ascent_N[good_N] > 0).all()
    assert (ascent_N[~good_N] <= 0).all()


def test_grpo_stops_pushing_past_its_clip() -> None:
    _, batch = make_batch(delta_scale=0.0)
    moved = (batch.reference_N + 1.0).requires_grad_()  # ratio e, far above the clip
    beyond = PolicyBatch(moved, batch.reference_N, batch.sampler_N, SEQUENCE_N, batch.advantage_S, 4)
    slope_N = gradient(OBJECTIVES["grpo"](beyond, torch.ones(10, dtype=torch.float64), 0.0), moved)
    positive_N = batch.advantage_S[SEQUENCE_N] > 0
    assert (slope_N[positive_N] == 0).all()
    assert (slope_N[~positive_N] > 0).all()


def test_advantages_by_hand() -> None:
    assert advantages([1, 0, 0, 1], "mirror_descent") == [0.5, -0.5, -0.5, 0.5]
    assert advantages([1, 0], "rloo") == [1.0, -1.0]  # own reward minus the other's
    assert advantages([1, 0], "grpo") == pytest.approx([1.0, -1.0], abs=1e-5)
    assert advantages([1, 0.5], "rest") == [1.0, 0.0]
    with pytest.raises(KeyError):
        advantages([1, 0], "ppo")


def test_importance_weight_is_truncated_and_carries_no_gradient() -> None:
    reference = torch.tensor([0.0, -1.0, -1.0], requires_grad=True)
    weight = importance_weight(reference, torch.tensor([0.0, -3.0, -0.5]), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-0.5)]))
    assert not weight.requires_grad


def test_mismatch_is_zero_only_when_equal() -> None:
    logprobs = torch.tensor([-1.0, -2.0])
    assert mismatch(logprobs, logprobs) == {"train/mismatch_kl": 0.0, "train/mismatch_max": 0.0}
    off = mismatch(logprobs, logprobs + torch.tensor([0.1, -0.2]))
    assert off["train/mismatch_max"] == pytest.approx(0.2, abs=1e-6)
    expected = (math.exp(-0.1) - 1 + 0.1 + math.exp(0.2) - 1 - 0.2) / 2
    assert off["train/mismatch_kl"] == pytest.approx(expected, abs=1e-6)
