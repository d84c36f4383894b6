"""Which problems are trained on and which are held out, where sources share ids, prompts or files."""

import json
from pathlib import Path

import pytest

from llm_rl.config import EvalConfig, LanguageJob, SFTConfig
from llm_rl.problem_sets import load_problem_sets
from models.errors import UserError


def write(path: Path, prompts: range, own_ids: bool = True) -> str:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"What is {n}?", "answer": f"{n}"} for n in prompts]
    rows = [row | {"id": f"{i}"} for i, row in enumerate(rows)] if own_ids else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("own_ids", [True, False])
def test_ids_are_of_one_problem_over_all_sets(tmp_path: Path, own_ids: bool) -> None:
    train = [write(tmp_path / name / "train.jsonl", r, own_ids) for name, r in (("a", range(8)), ("b", range(10, 18)))]
    test = write(tmp_path / "test.jsonl", range(20, 25), own_ids)
    sets = load_problem_sets(LanguageJob(problems=(*train,), eval=EvalConfig((test,), 5)), seed=0)
    everything = [*sets.train, *sets.heldout]
    assert len({p.id for p in everything}) == len({p.prompt for p in everything}) == 21
    assert {p.source for p in sets.train} == {*train}


def test_no_prompt_is_held_out_twice(tmp_path: Path) -> None:
    sources = (write(tmp_path / "a.jsonl", range(20)), write(tmp_path / "b.jsonl", range(30)))
    sets = load_problem_sets(LanguageJob(problems=sources), seed=0)
    held_out, train = [p.prompt for p in sets.heldout], [p.prompt for p in sets.train]
    assert len({*held_out, *train}) == len(held_out) + len(train) == 30


@pytest.mark.parametrize("flag", ["--problems", "--eval.problems", "--sft.problems"])
def test_a_file_named_twice(tmp_path: Path, flag: str) -> None:
    file, other = write(tmp_path / "a.jsonl", range(9)), write(tmp_path / "b.jsonl", range(9))
    twice = (file, str(tmp_path / "x" / ".." / "a.jsonl"))
    config = LanguageJob(
        problems=twice if flag == "--problems" else (other,),
        eval=EvalConfig(twice if flag == "--eval.problems" else ()),
        sft=SFTConfig(twice if flag == "--sft.problems" else ()),
    )
    with pytest.raises(UserError, match=rf"^{flag} names the file .*a\.jsonl twice: keep one$"):
        load_problem_sets(config, seed=0)
