"""One iteration of the learner on the CPU: its weight on the sampler's log-probabilities, and what moves the policy."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_rl.batch import Sample
from llm_rl.config import LearnerConfig, RLConfig
from llm_rl.learner import Learner
from llm_rl.objective import OBJECTIVES, advantages
from models.language.checkpoint import save_pretrained
from models.language.decoder import Decoder
from tests.models.language.policies import DEEPSEEK, DENSE, MOE, made

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


def samples(rewards: list[float], objective: str, group: int) -> list[Sample]:
    values = advantages(rewards, objective)
    return [
        Sample(list(range(5, 15 + i)), list(range(40, 60 - i)), [-4.0] * (20 - i), value, group)
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("config", [MOE, DEEPSEEK], ids=["moe", "deepseek"])
def test_groups_without_a_signal_leave_the_policy_as_it_is(config: object, objective: str, tmp_path: Path) -> None:
    save_pretrained(Decoder(config).init_weights(0), tmp_path)  # type: ignore[arg-type]
    learner = Learner(tmp_path, LearnerConfig(router_aux_loss_coef=0.01, threads=1), "cpu")
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    settings = RLConfig(objective=objective, minibatches=2)  # type: ignore[arg-type]
    # the mean of seven times 0.05 is not 0.05 in float64
    silent = [*samples([0.05] * 7, objective, 0), *samples([0.0] * 4, objective, 1)]
    figures = learner.iterate(silent, settings, 1e-2, 0, 1)
    assert figures["train/grad_norm"] == 0
    assert figures["train/importance_weight"] > 0
    assert figures["moe/load_entropy"] > 0
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    figures = learner.iterate([*silent, *samples([1.0, 0.0], objective, 2)], settings, 1e-2, 0, 2)
    assert figures["train/grad_norm"] > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
