"""What one iteration of the learner makes of the sampler's log-probabilities."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from llm_rl.batch import Sample
from llm_rl.config import LearnerConfig, RLConfig
from llm_rl.learner import Learner
from models.language.checkpoint import save_pretrained
from tests.models.language.policies import DENSE, made

SAMPLES = [Sample([5, 6], [7 + i, 8, 9 + i], [], (-1.0) ** i, i // 2) for i in range(4)]


@pytest.mark.parametrize(
    ("ratio", "cap", "weight"), [(1.0, 2.0, 1.0), (1.5, 2.0, 1.5), (0.3, 2.0, 0.3), (4.0, 3.0, 3.0)]
)
def test_gradients_are_weighted_by_the_capped_ratio_to_the_sampler(
    tmp_path: Path, ratio: float, cap: float, weight: float
) -> None:
    save_pretrained(made(DENSE), tmp_path)
    learner = Learner(tmp_path, LearnerConfig(threads=1), "cpu")
    reference = [scores.tolist() for scores in learner.score(SAMPLES, 1.0)]
    settings = RLConfig(minibatches=1, importance_cap=cap)

    def iterate(ratio: float) -> dict[str, float]:
        sampled = [[value - math.log(ratio) for value in row] for row in reference]
        samples = [replace(s, sampler_logprobs=row) for s, row in zip(SAMPLES, sampled, strict=True)]
        return learner.iterate(samples, settings, lr=0.0, seed=0, step=1)

    figures = iterate(ratio)
    assert figures["train/importance_weight"] == pytest.approx(weight, rel=1e-4)
    assert figures["train/grad_norm"] == pytest.approx(weight * iterate(1.0)["train/grad_norm"], rel=1e-4)
