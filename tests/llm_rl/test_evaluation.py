from itertools import combinations

import pytest

from llm_rl.evaluation import heldout_metrics, pass_at_k
from llm_rl.generator import Completion


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 4), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_success(n: int, c: int, k: int) -> None:
    outcomes = [i < c for i in range(n)]
    draws = list(combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_refuses_too_few_samples() -> None:
    with pytest.raises(ValueError, match="pass@4"):
        pass_at_k(3, 1, 4)


def test_metrics_by_hand() -> None:
    def completion(length: int, finish: str = "stop") -> Completion:
        return Completion([1] * length, [0.0] * length, finish, 1)

    metrics = heldout_metrics(
        "rl",
        ["gym:a", "gym:b"],
        greedy=[True, False],
        sampled=[[True, True], [True, False]],
        completions=[[completion(2), completion(4)], [completion(6), completion(8, "length")]],
        rewards=[[1.0, 1.0], [1.0, 0.5]],
    )
    assert metrics["heldout/pass@1/rl"] == 0.75
    assert metrics["heldout/pass@2/rl"] == 1.0
    assert metrics["heldout/greedy/rl"] == 0.5
    assert metrics["heldout/mean_tokens/rl"] == 5.0
    assert metrics["heldout/reward/rl"] == 0.875
    assert metrics["heldout/unfinished/rl"] == 0.25
    assert metrics["heldout/pass@1/rl/gym:b"] == 0.5
