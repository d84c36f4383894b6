import numpy as np
import pytest
import torch

from agents.vision.ddpo_loss import (
    StepBatch,
    gaussian_log_prob,
    importance_sampling_loss,
    policy_change,
    score_function_loss,
)
from agents.vision.prompt_statistics import PromptStatistics

CLIP = 0.1


def batch(log_probs: torch.Tensor, shift: torch.Tensor | float = 0.0) -> StepBatch:
    return StepBatch(log_probs, log_probs.detach() - shift, torch.tensor([1.0, -2.0, 0.5, -0.1]))


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_log_probability() -> None:
    x, mean = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mean, 0.3), expected)


def test_both_estimators_agree_where_the_policies_do() -> None:
    log_probs = torch.tensor([-1.0, -2.0, 0.3, 0.0], requires_grad=True)
    expected = gradient(score_function_loss(batch(log_probs)), log_probs)
    torch.testing.assert_close(gradient(importance_sampling_loss(batch(log_probs), CLIP), log_probs), expected)
    torch.testing.assert_close(expected, -batch(log_probs).advantages_B / 4)  # −A ∇log p, by hand


def test_clipping_stops_what_has_gone_far_enough() -> None:
    """Only a step that would go further where it pays: up with A > 0, down with A < 0."""
    log_probs = torch.zeros(4, requires_grad=True)
    for shift, stopped in ((0.2, [True, False, True, False]), (-0.2, [False, True, False, True])):
        grad = gradient(importance_sampling_loss(batch(log_probs, shift), CLIP), log_probs)
        assert (grad == 0).tolist() == stopped
        ratio = torch.tensor(shift).exp()
        kept = ~torch.tensor(stopped)
        torch.testing.assert_close(grad[kept], -(ratio * batch(log_probs).advantages_B / 4)[kept])


def test_importance_sampling_corrects_for_the_sampling_policy() -> None:
    """The exact expectation of the unclipped estimator under p_old is the gradient of E_p[reward]."""
    logits, old = torch.tensor([0.2, -0.5, 1.0], requires_grad=True), torch.tensor([0.0, 0.3, -0.2])
    rewards = torch.tensor([1.0, -1.0, 3.0])
    expected = gradient((logits.softmax(0) * rewards).sum(), logits)
    found = torch.zeros(3)
    for action, probability in enumerate(old.softmax(0)):
        one = StepBatch(logits.log_softmax(0)[[action]], old.log_softmax(0)[[action]], rewards[[action]])
        found -= probability * gradient(importance_sampling_loss(one, 1e9), logits)
    torch.testing.assert_close(found, expected)


def test_policy_change() -> None:
    figures = policy_change(batch(torch.zeros(4), torch.tensor([0.0, 0.05, 0.2, -0.2])), CLIP)
    assert float(figures["train/clip_fraction"]) == 0.5
    assert float(figures["train/approx_kl"]) == pytest.approx((0.05**2 + 2 * 0.2**2) / 8)


def test_each_prompt_is_judged_by_itself() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    advantages = statistics.advantages(["easy", "hard", "easy", "hard"], np.array([10.0, 1.0, 12.0, 3.0]))
    assert advantages == pytest.approx([-1, -1, 1, 1], abs=1e-5)


def test_rare_prompts_are_judged_by_the_batch() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    rewards = np.array([0.0, 2.0, 7.0])
    advantages = statistics.advantages(["a", "a", "rare"], rewards)
    assert advantages[2] == pytest.approx((7 - rewards.mean()) / rewards.std(), abs=1e-5)


def test_old_rewards_are_forgotten_and_the_others_kept_over_a_checkpoint() -> None:
    statistics = PromptStatistics(buffer_size=3, min_count=1)
    statistics.advantages(["a"] * 4, np.array([100.0, 1.0, 2.0, 3.0]))
    resumed = PromptStatistics(buffer_size=3, min_count=1)
    resumed.load_state(statistics.state())
    for each in (statistics, resumed):  # 2, 3 and 4 are left
        assert each.advantages(["a"], np.array([4.0]))[0] == pytest.approx(1 / np.std([2, 3, 4]), abs=1e-4)
