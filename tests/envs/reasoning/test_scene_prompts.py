"""The problems of PromptScene, and the judge with its stand-in for the models."""

import itertools
from dataclasses import asdict

import pytest

from envs.reasoning.problem import Problem
from envs.reasoning.scene_judge import SceneJudge
from envs.reasoning.scene_prompts import SceneJudgeConfig, parse_scene_source, scene_of, specification
from envs.reasoning.sources import load_problems
from envs.vision.scene_spec import PLACES, parse_caption
from models.errors import UserError

SOURCE = "scene:prompt?min_objects=1&max_objects=3"
TWO = parse_caption(
    "a large striped red circle at the bottom left and a blue handwritten 7 in the centre, "
    "on a checkered grey background"
)


def test_a_specification() -> None:
    assert specification(TWO).splitlines() == [
        "Write a prompt that draws this scene.",
        "ground colour=grey pattern=checkered",
        "x=2 y=2 kind=7 size=2 texture=solid colour=blue",
        "x=1 y=3 kind=circle size=3 texture=striped colour=red",
    ]
    assert scene_of(asdict(TWO)) == TWO


def test_the_solution_is_the_caption_and_cannot_be_copied() -> None:
    for problem in load_problems(SOURCE, 100, seed=0):
        assert problem.solution == problem.answer == scene_of(problem.metadata).caption()
        assert problem.prompt == specification(parse_caption(problem.answer))
        pairs = itertools.pairwise(problem.answer.replace(",", "").split())
        assert not [pair for pair in pairs if " ".join(pair) in problem.prompt]


def test_problems_repeat_by_seed_and_are_kept_apart() -> None:
    problems = load_problems(SOURCE, 50, seed=1)
    assert load_problems(SOURCE, 20, seed=1) == problems[:20]
    assert len({p.prompt for p in problems}) == len({p.id for p in problems}) == 50
    assert {p.source for p in problems} == {problems[0].id.partition("@")[0]}
    assert {p.difficulty for p in problems} == {1.0, 2.0, 3.0}
    others = load_problems(SOURCE, 50, seed=1, exclude=problems)
    assert not {p.prompt for p in problems} & {p.prompt for p in others}


def test_careless_solutions_name_no_places() -> None:
    problems = load_problems("scene:prompt?careless=0.5", 200, seed=0)
    careless = [p for p in problems if p.solution != p.answer]
    assert 70 < len(careless) < 130
    for problem in careless:
        assert problem.solution is not None
        assert not any(place in problem.solution for place in PLACES)
        for thing in scene_of(problem.metadata).objects:
            assert thing.phrase().removesuffix(f" {PLACES[thing.place]}") in problem.solution


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("scene:promt", "did you mean `prompt`"),
        ("scene:prompt?max_object=2", "max_objects"),
        ("scene:prompt?max_objects=two", "must be a number"),
        ("scene:prompt?max_objects=10", "from 1 to 9"),
        ("scene:prompt?min_objects=3&max_objects=2", "in order"),
        ("scene:prompt?careless=2", "from 0 to 1"),
        ("scene:prompt?careless", "write parameters as"),
    ],
)
def test_bad_sources(source: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_scene_source(source)


def test_more_scenes_than_there_are() -> None:
    with pytest.raises(UserError, match="say how many"):
        load_problems("scene:prompt", None, seed=0)


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return SceneJudge(SceneJudgeConfig(drawer="renderer"), seed=0)


def score(judge: SceneJudge, *completions: str) -> list[tuple[float, str]]:
    problem = Problem("p", specification(TWO), TWO.caption(), "scene", metadata=asdict(TWO))
    verdicts = judge.score([problem] * len(completions), list(completions))
    return [(verdict.reward, verdict.reason) for verdict in verdicts]


def test_the_share_of_the_scene_that_is_seen_is_paid(judge: SceneJudge) -> None:
    assert score(
        judge,
        TWO.caption(),
        f"<think>circle, then 7</think>{TWO.caption()}",
        "a blue handwritten 7 in the centre",
        "a red circle at the bottom left beside a giraffe and a green handwritten 7 in the centre",
        "a blue circle at the bottom left and a red handwritten 7 in the centre",
        "a giraffe",
        "",
        "<think>a red circle",
    ) == [
        (1.0, "correct"),
        (1.0, "correct"),
        (0.5, "partial"),
        (0.5, "partial"),
        (0.0, "wrong"),
        (0.0, "wrong"),
        (0.0, "unparsable"),
        (0.0, "unparsable"),
    ]


def test_what_nobody_asked_for_costs(judge: SceneJudge) -> None:
    everywhere = " and ".join(f"a {c} {k} {p}" for p in PLACES for c, k in [("red", "circle")])
    assert score(judge, f"{TWO.caption()}, a green star at the top and a pink ring at the top right") == [
        (0.5, "partial")
    ]
    assert score(judge, everywhere)[0][0] <= 1 / 8  # a circle may be hidden behind another


def test_right_captions_are_paid_in_full(judge: SceneJudge) -> None:
    problems = load_problems(SOURCE, 100, seed=0)
    verdicts = judge.score(problems, [p.answer for p in problems])
    assert sum(verdict.reward for verdict in verdicts) > 98  # what one object hides of another is lost
    careless = load_problems("scene:prompt?careless=1", 100, seed=0)
    forgetful = judge.score(careless, [p.solution or "" for p in careless])
    assert 5 < sum(verdict.reward for verdict in forgetful) < 40  # places by chance


def test_pictures(judge: SceneJudge) -> None:
    assert judge.pictures(["a red circle", "", "a giraffe"]).shape == (2, 64, 64, 3)
    assert len(judge.pictures([""])) == 0
