"""Problems of both kinds in one call, and judges that die."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from envs.reasoning.problem import Problem
from envs.reasoning.scene_prompts import SceneJudgeConfig
from envs.reasoning.sources import load_problems
from envs.vision import shipped_weights
from launch.local_group import LocalGroup
from llm_rl.config import LanguageJob
from llm_rl.verifiers import Verifiers
from models.errors import UserError

SCENES = load_problems("scene:prompt", 6, seed=0)
SUMS = [Problem(f"sum#{i}", f"1+{i}", str(1 + i), "exact") for i in range(3)]
JOB = LanguageJob(scene=SceneJudgeConfig(drawer="renderer", batch_size=2, workers=2))


class FrailGroup(LocalGroup):
    """Dies of the calls of these numbers."""

    def __init__(self, dies_at: set[int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dies_at, self.calls = dies_at, 0

    def call(self, *arguments: Any, **settings: Any) -> "Future[Any]":
        self.calls += 1
        if self.calls - 1 not in self.dies_at:
            return super().call(*arguments, **settings)
        future: Future[Any] = Future()
        future.set_exception(ConnectionError("scene-0 is gone"))
        return future


class FakeRun:
    seed, device = 0, "cpu"

    def __init__(self, dies_at: set[int]) -> None:
        self.dies_at = dies_at

    def actors(self, cls: type, count: int, resources: Any, *arguments: Any, name: str) -> FrailGroup:
        return FrailGroup(self.dies_at, cls, count, arguments, {})


def verifiers(problems: list[Problem], dies_at: set[int] = frozenset()) -> Verifiers:  # type: ignore[assignment]
    return Verifiers(JOB, FakeRun(dies_at), problems)  # type: ignore[arg-type]


def test_each_completion_goes_to_its_own_judge() -> None:
    problems = [SUMS[0], *SCENES[:3], SUMS[1], *SCENES[3:], SUMS[2]]
    judges = verifiers(problems)
    try:
        right = judges.score(problems, [p.answer for p in problems])
        wrong = judges.score(problems, ["no"] * len(problems))
    finally:
        judges.close()
    assert [verdict.reward for verdict in right] == [1.0] * 9
    assert [verdict.reward for verdict in wrong] == [0.0] * 9
    assert judges.counts == {"correct": 6, "wrong": 6}


def test_nothing_is_started_that_no_problem_needs() -> None:
    only_scenes, only_sums = verifiers(SCENES), verifiers(SUMS)
    assert only_scenes.pool is None
    assert only_sums.judges is None
    assert len(only_sums.pictures(["1"])) == 0
    only_sums.close()


def test_a_batch_whose_judge_dies_is_judged_by_the_next() -> None:
    judges = verifiers(SCENES, dies_at={0, 2})
    assert [v.reward for v in judges.score(SCENES, [p.answer for p in SCENES])] == [1.0] * 6


def test_a_batch_that_is_lost_twice_is_counted() -> None:
    judges = verifiers(SCENES, dies_at={1, 3})  # the second of three batches, and its repetition
    verdicts = judges.score(SCENES, [p.answer for p in SCENES])
    assert [v.reason for v in verdicts] == ["correct"] * 2 + ["lost"] * 2 + ["correct"] * 2
    assert judges.counts == {"correct": 4, "lost": 2}


def test_judges_that_never_answer_end_the_job() -> None:
    with pytest.raises(UserError, match=r"--scene\.timeout-s 120 s"):
        verifiers(SCENES, dies_at=set(range(100))).score(SCENES, [p.answer for p in SCENES])


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped_weights, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"no diffusion model of scenes comes with .*--scene\.diffusion"):
        Verifiers(LanguageJob(), FakeRun(set()), SCENES)  # type: ignore[arg-type]
    config = LanguageJob(scene=SceneJudgeConfig(diffusion=tmp_path, detector=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: no model there.*--scene\.detector"):
        Verifiers(config, FakeRun(set()), SCENES)  # type: ignore[arg-type]
