import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from envs.reasoning import gym_dataset
from envs.reasoning.lenient_scorers import corrected
from envs.reasoning.sources import load_problems
from models.errors import UserError

SMALL = "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"  # 200 different questions


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- reasoning-gym


def test_gym_problems_are_stable() -> None:
    long, short = load_problems(SMALL, 150, seed=3), load_problems(SMALL, 50, seed=3)
    assert long[:50] == short
    assert load_problems(SMALL, 150, seed=4)[:50] != short
    assert short[0].id.startswith("gym:chain_sum?max_digits=1&max_terms=2&min_digits=1&min_terms=2@3#")
    assert len({problem.id for problem in long}) == len({problem.prompt for problem in long}) == 150
    reordered = "gym:chain_sum?max_terms=2&min_digits=1&min_terms=2&max_digits=1"
    assert load_problems(reordered, 50, seed=3) == short
    assert {problem.source for problem in long} == {short[0].id.partition("@")[0]}


def test_neighbouring_seeds_do_not_share_problems() -> None:
    """reasoning-gym seeds item i with seed + i, so that its own datasets of seeds 1 and 2 do share them."""
    one, two = (create_dataset("gcd", seed=seed, size=10) for seed in (1, 2))
    assert one[1]["question"] == two[0]["question"]
    ours = [{problem.prompt for problem in load_problems("gym:gcd?max_value=100000", 100, seed)} for seed in (1, 2)]
    assert not ours[0] & ours[1]


def test_training_and_held_out_problems_are_disjoint_in_the_smallest_family() -> None:
    held_out = load_problems(SMALL, 60, seed=1)
    training = load_problems(SMALL, 140, seed=2, exclude=held_out)
    assert not {problem.prompt for problem in training} & {problem.prompt for problem in held_out}
    with pytest.raises(UserError, match="ran out of new questions after 140 of 141"):
        load_problems(SMALL, 141, seed=2, exclude=held_out)


@pytest.mark.parametrize("family", sorted(DATASETS.keys() - {"composite"}))
def test_every_family_survives_the_trip_through_json(family: str) -> None:
    """The scorer gives an entry that went through JSON the score that it gives the original."""
    dataset = create_dataset(family, seed=6, size=2)
    entry = dataset[0]
    packed = json.loads(json.dumps(gym_dataset.pack_entry(gym_dataset.GymSpec(family, {}), entry)))
    assert gym_dataset._unpack(packed["entry"]) == entry
    for answer in (entry["answer"] or "{}", "0"):
        try:
            expected = dataset.score_answer(answer, entry)
        except Exception as error:  # noqa: BLE001 - some scorers raise for a malformed answer
            with pytest.raises(type(error)):
                gym_dataset.score(answer, packed)
        else:
            expected = corrected(expected, family, answer, entry)
            assert gym_dataset.score(answer, packed) == expected
    if entry["answer"]:
        assert gym_dataset.score(entry["answer"], packed) >= 0.99


def test_parameters_reach_the_scorer() -> None:
    """decimal_arithmetic rounds to `max_num_decimal_places`, a parameter."""
    (problem,) = load_problems("gym:decimal_arithmetic?min_num_decimal_places=2&max_num_decimal_places=2", 1, seed=0)
    assert problem.metadata["params"] == {"min_num_decimal_places": 2, "max_num_decimal_places": 2}
    assert gym_dataset.score(problem.answer, problem.metadata) == 1.0


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        ("chain_sum?max_terms=9&allow_negation=true", {"max_terms": 9, "allow_negation": True}),
        ("chain_sum?allow_negation=False", {"allow_negation": False}),
        ("number_sorting?min_value=-5", {"min_value": -5}),
        ("basic_arithmetic?operators=%2B,-&format_style=natural", {"operators": ["+", "-"], "format_style": "natural"}),
        ('simple_equations?operators=["%2B"]&operators_weights=[1]', {"operators": ("+",), "operators_weights": [1]}),
    ],
)
def test_parameters_are_parsed_to_their_types(spec: str, params: dict) -> None:
    parsed = gym_dataset.parse_spec(f"gym:{spec}")
    assert {name: list(value) if isinstance(value, tuple) else value for name, value in parsed.params.items()} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in params.items()
    }
    assert gym_dataset.parse_spec(str(parsed).replace("+", "%2B")) == parsed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gym:chain_sums", "did you mean `chain_sum`"),
        ("gym:qqq", "unknown reasoning-gym family `qqq`: use "),
        ("gym:chain_sum?max_term=3", "did you mean `max_terms`"),
        ("gym:chain_sum?max_terms=three", "must be int"),
        ("gym:chain_sum?max_terms=2.5", "must be int"),
        ("gym:chain_sum?allow_negation=1", "must be bool"),
        ("gym:chain_sum?max_terms", "name=value"),
        ("gym:chain_sum?max_terms=3&max_terms=4", "twice"),
        ("gym:chain_sum?min_terms=5&max_terms=3", "reasoning-gym refuses"),
        ("gym:chain_sum?seed=3", "not a parameter"),
        ("gym:composite", "each of these as a source"),
        ('gym:composite?datasets=[{"name":"n_queens","weight":1,"config":{}}]', "each of these as a source"),
    ],
)
def test_bad_gym_specs(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_problems(spec, 1, seed=0)
    assert "\n" not in str(caught.value)


def test_a_gym_family_needs_a_count() -> None:
    with pytest.raises(UserError, match="how many"):
        load_problems("gym:chain_sum", None, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        load_problems("gym:chain_sum", 0, seed=0)


def test_difficulty_grows_with_the_instance() -> None:
    problems = load_problems("gym:chain_sum?max_terms=6&min_digits=2&max_digits=2", 100, seed=0)
    assert len({problem.difficulty for problem in problems}) == 5
    by_terms = sorted(problems, key=lambda problem: problem.prompt.count("+") + problem.prompt.count(" -"))
    assert [p.difficulty for p in by_terms] == sorted(p.difficulty for p in problems if p.difficulty is not None)
    easy, hard = (load_problems(f"gym:gcd?max_value={value}", 1, seed=0)[0].difficulty for value in (10, 10**6))
    assert easy is not None
    assert hard is not None
    assert easy < hard


# --- files


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "1+1", "answer": "2", "source": "ignored"},
        "",
        {"prompt": "a", "answer": "b", "id": "x", "verifier": "exact", "difficulty": 3, "solution": "<think></think>b"},
    )
    first, second = load_problems(str(path), None, seed=0)
    assert (first.id, first.verifier, first.difficulty, first.solution) == (f"{path}:1", "math", None, None)
    assert (second.id, second.verifier, second.difficulty) == (f"{path}#x", "exact", 3.0)
    assert second.solution == "<think></think>b"
    assert first.source == second.source == str(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["1", "2"], "answer": ["a", "b"], "difficulty": [1, None], "x": [[], []]}), path)
    first, second = load_problems(str(path), None, seed=0)
    assert (first.prompt, first.answer, first.difficulty, first.id) == ("1", "a", 1.0, f"{path}:1")
    assert second.difficulty is None
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is the file complete"):
        load_problems(str(path), None, seed=0)
    pq.write_table(pa.table({"prompt": ["1"], "answer": [1]}), path)
    with pytest.raises(UserError, match="parquet:1: `answer` is int, not a string"):
        load_problems(str(path), None, seed=0)
    pq.write_table(pa.table({"prompt": ["1"]}), path)
    with pytest.raises(UserError, match="parquet:1: `answer` is missing"):
        load_problems(str(path), None, seed=0)


def test_own_ids_of_one_file_are_those_of_no_other(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "answer": "1", "id": str(n)} for n in range(3)]
    problems = []
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        path = write_jsonl(tmp_path / split / "p.jsonl", *rows, {"prompt": split, "answer": "1"})
        problems += load_problems(str(path), None, seed=0)
    assert len({problem.id for problem in problems}) == 8


def test_a_sample_of_a_file_and_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(write_jsonl(tmp_path / "p.jsonl", *({"prompt": str(n), "answer": "1"} for n in range(50))))
    held_out = load_problems(path, 10, seed=0)
    assert held_out == load_problems(path, 10, seed=0) != load_problems(path, 10, seed=1)
    rest = load_problems(path, None, seed=0, exclude=held_out)
    assert {p.prompt for p in rest} | {p.prompt for p in held_out} == {str(n) for n in range(50)}
    assert len(rest) == 40
    assert "left out 10 problems that are held out" in caplog.text
    with pytest.raises(UserError, match="has 40 usable problems, 41 asked for"):
        load_problems(path, 41, seed=0, exclude=held_out)
    with pytest.raises(UserError, match=r"p\.jsonl`: all its problems are held out, or in a source before it: leave"):
        load_problems(path, None, seed=0, exclude=[*held_out, *rest])


def test_repeated_prompts_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", *({"prompt": "same", "answer": "1"} for _ in range(3)))
    assert len(load_problems(str(path), None, seed=0)) == 1
    assert "left out 2 problems" in caplog.text


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, '{"prompt": "q", "answer"'], "jsonl:2: not JSON"),
        ([GOOD, "[" * 100_000], "jsonl:2: not JSON"),
        ([GOOD, "[1]"], "jsonl:2: a list"),
        ([GOOD, {"question": "q", "answer": "a"}], "jsonl:2: `prompt` is missing .there is: question, answer"),
        ([GOOD, {}], "jsonl:2: `prompt` is missing .there is: nothing"),
        ([GOOD, {"prompt": "q", "answer": 5}], "jsonl:2: `answer` is int, not a string"),
        ([GOOD, {"prompt": ["q"], "answer": "5"}], "jsonl:2: `prompt` is list"),
        ([GOOD, {"prompt": "q", "answer": None}], "jsonl:2: `answer` is missing"),
        ([GOOD, {"prompt": " ", "answer": "5"}], "jsonl:2: `prompt` is empty"),
        ([GOOD, '{"prompt": "\\ud800", "answer": "5"}'], "jsonl:2: `prompt` holds a lone surrogate"),
        ([GOOD, GOOD | {"prompt": "q", "difficulty": "hard"}], "jsonl:2: `difficulty` is `hard`"),
        ([GOOD, '{"prompt": "q", "answer": "a", "difficulty": NaN}'], "jsonl:2: `difficulty` is `nan`"),
        ([GOOD, GOOD | {"prompt": "q", "verifier": "maths"}], "jsonl:2: .*did you mean `math`"),
        ([GOOD, GOOD | {"prompt": "q", "verifier": "gym"}], "jsonl:2: unknown verifier `gym`"),
        ([GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"}], "jsonl:3: id `x` is taken by .*jsonl:1"),
        ([], "holds no problems"),
        (["", " "], "holds no problems"),
    ],
)
def test_bad_jsonl(tmp_path: Path, rows: list, message: str) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError, match=message) as caught:
        load_problems(str(path), None, seed=0)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "answer": "a"}\n')
    with pytest.raises(UserError, match="jsonl:1: not JSON"):
        load_problems(str(path), None, seed=0)


@pytest.mark.parametrize("spec", ["no/such.jsonl", "no/such.parquet", "."])
def test_missing_files(spec: str) -> None:
    with pytest.raises(UserError, match=r"no file|use gym:FAMILY"):
        load_problems(spec, None, seed=0)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ending in \.jsonl or \.parquet"):
        load_problems(str(tmp_path / "p.csv"), None, seed=0)
