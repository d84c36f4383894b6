"""From verdicts to advantages: when the length reward counts, and which groups carry a signal."""

from types import SimpleNamespace

import pytest

from envs.reasoning.problem import Problem, Verdict
from llm_rl.config import ReasonConfig, RLConfig
from llm_rl.generator import Completion
from llm_rl.reason import judge, validate
from llm_rl.session import Attempt
from models.errors import UserError

PROBLEMS = [Problem(name, f"{name}?", "1", "exact") for name in ("both right", "one right", "both wrong")]
SESSION = SimpleNamespace(prompts={problem.prompt: [len(problem.prompt)] for problem in PROBLEMS})
RL = RLConfig(length_reward=0.4, length_reward_from=3)


def attempt(length: int, right: bool) -> Attempt:
    verdict = Verdict(1.0, "correct") if right else Verdict(0.0, "wrong")
    return Attempt(Completion([7] * length, [0.0] * length, "stop", 1), "", verdict)


ATTEMPTS = [
    [attempt(2, True), attempt(6, True)],
    [attempt(6, True), attempt(2, False)],
    [attempt(2, False), attempt(6, False)],
]


def rewards_at(iteration: int) -> tuple[list[float], list[float], float]:
    samples, metrics = judge(SESSION, PROBLEMS, ATTEMPTS, RL, iteration)  # type: ignore[arg-type]
    assert [sample.group for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert [sample.prompt for sample in samples] == [SESSION.prompts[p.prompt] for p in PROBLEMS for _ in range(2)]
    assert metrics["train/correct"] == 0.5
    return [s.reward for s in samples], [s.advantage for s in samples], metrics["train/mixed_groups"]


@pytest.mark.parametrize("iteration", [0, 2])
def test_before_the_length_reward_starts(iteration: int) -> None:
    rewards, advantages, mixed = rewards_at(iteration)
    assert rewards == [1, 1, 1, 0, 0, 0]
    assert advantages == [0, 0, 0.5, -0.5, 0, 0]
    assert mixed == pytest.approx(1 / 3)


@pytest.mark.parametrize("iteration", [3, 9])
def test_from_then_on_right_answers_gain_by_being_short_and_long_ones_lose(iteration: int) -> None:
    rewards, advantages, mixed = rewards_at(iteration)
    assert rewards == pytest.approx([1.2, 0.8, 0.8, 0, 0, -0.2])
    assert advantages == pytest.approx([0.2, -0.2, 0.4, -0.4, 0.1, -0.1])
    assert mixed == 1.0


def test_rest_takes_no_length_reward() -> None:
    config = ReasonConfig(rl=RLConfig(objective="rest", length_reward=0.5))
    with pytest.raises(UserError, match=r"--rl\.length-reward 0\.5: --rl\.objective rest"):
        validate(config, "cpu")
    validate(ReasonConfig(rl=RLConfig(objective="rest")), "cpu")
