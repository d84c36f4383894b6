"""Curriculum and prioritised sampling: probabilities, admission, state."""

import json
from pathlib import Path

import numpy as np
import pytest

from envs.reasoning.problem import Problem
from envs.reasoning.sources import load_problems
from llm_rl.sampler import FLOOR, LEVELS, ProblemSampler, family, levels
from models.errors import UserError


def problems(count: int, source: str = "gym:a?x=1", levels: int = 1) -> list[Problem]:
    return [
        Problem(f"{source}#{i}", f"{source}{i}", "1", "exact", difficulty=float(i % levels), source=source)
        for i in range(count)
    ]


def test_draws_in_proportion_to_failure_rate() -> None:
    sampler = ProblemSampler(problems(4), seed=0, prioritised=True, curriculum=False, admit_at=0.5)
    sampler.success_P = np.array([0.0, 0.5, 0.8, 1.0])
    drawn = np.bincount([sampler.sample(1, i)[0] for i in range(8000)], minlength=4) / 8000
    weights = np.array([1.0, 0.5, 0.2, FLOOR])
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=0.02)


def test_draws_without_replacement_and_repeatably() -> None:
    sampler = ProblemSampler(problems(50), seed=3, prioritised=True, curriculum=False, admit_at=0.5)
    first = sampler.sample(20, 7)
    assert len(set(first)) == 20
    assert first == sampler.sample(20, 7)
    assert first != sampler.sample(20, 8)
    assert len(sampler.sample(500, 0)) == 50


def test_curriculum_admits_the_next_level_of_the_family_that_succeeds() -> None:
    both = problems(30, "gym:easy?x=1", 3) + problems(30, "gym:hard?x=1", 3)
    sampler = ProblemSampler(both, seed=0, prioritised=False, curriculum=True, admit_at=0.6)
    assert {both[i].difficulty for i in sampler.sample(60, 0)} == {0.0}
    for iteration in range(40):
        chosen = sampler.sample(10, iteration)
        sampler.update(chosen, [1.0 if both[i].id.startswith("gym:easy") else 0.0 for i in chosen])
    assert sampler.admitted == {"gym:easy": 2, "gym:hard": 0}
    seen = {(both[i].id.split("?")[0], both[i].difficulty) for i in sampler.sample(60, 99)}
    assert seen == {("gym:easy", 0.0), ("gym:easy", 1.0), ("gym:easy", 2.0), ("gym:hard", 0.0)}


def test_state_restores_everything() -> None:
    first = ProblemSampler(problems(40, levels=4), 1, prioritised=True, curriculum=True, admit_at=0.6)
    for iteration in range(12):
        first.update(chosen := first.sample(5, iteration), [0.7] * len(chosen))
    second = ProblemSampler(problems(40, levels=4), 1, prioritised=True, curriculum=True, admit_at=0.6)
    second.load_state(first.state())
    assert second.sample(5, 12) == first.sample(5, 12)
    assert second.metrics() == first.metrics()
    assert second.visits_P.sum() == first.visits_P.sum() > 0


def test_the_state_of_other_problems_is_refused() -> None:
    state = ProblemSampler(problems(4), 1, prioritised=True, curriculum=True, admit_at=0.6).state()
    for others in (problems(5), problems(4, "b.jsonl")):
        with pytest.raises(
            UserError, match=r"knows 4 problems of gym:a, and there are \d of .*: bring back the problems"
        ):
            ProblemSampler(others, 1, prioritised=True, curriculum=True, admit_at=0.6).load_state(state)


def test_the_family_of_a_file_is_the_file_and_of_a_generator_its_name(tmp_path: Path) -> None:
    named = tmp_path / "what?" / "train#1.jsonl"
    named.parent.mkdir()
    rows = [{"prompt": f"{i}", "answer": "1", "id": f"algebra-{i}", "difficulty": i % 3} for i in range(9)]
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = [
        *load_problems("scene:prompt?max_objects=1", 2, seed=0),
        *load_problems("gym:gcd?max_value=9", 2, seed=0),
    ]
    own = load_problems(str(named), None, seed=0)
    assert [family(p) for p in generated] == ["scene:prompt"] * 2 + ["gym:gcd"] * 2
    assert {family(p) for p in own} == {str(named)}
    sampler = ProblemSampler(own, 0, prioritised=False, curriculum=True, admit_at=0.6)
    assert {own[i].difficulty for i in sampler.sample(9, 0)} == {0.0}  # own ids do not switch the curriculum off


def test_many_difficulties_become_a_few_levels_of_equal_size_in_order() -> None:
    difficulties = np.random.default_rng(0).permutation(1000).astype(float)
    level = levels(difficulties)
    assert np.bincount(level).tolist() == [200] * LEVELS
    order = np.argsort(difficulties)
    assert (np.diff(level[order]) >= 0).all()
    assert levels([3.0, 1.0, 3.0, 2.0]).tolist() == [2, 0, 2, 1]
    skewed = levels([0.0] * 90 + list(range(1, 11)))  # most problems share one difficulty
    assert sorted(set(skewed.tolist())) == list(range(len(set(skewed.tolist()))))
