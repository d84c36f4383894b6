"""Where problems come from: reasoning-gym families, scenes to write prompts for, JSONL files, Parquet files.

Problems of one load have distinct ids and distinct prompts. Training and held-out problems are kept apart by passing
the one as `exclude` of the other: seeds alone do not do it where a family has few questions.
"""

import itertools
import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from envs.reasoning import gym_dataset
from envs.reasoning.problem import Problem
from envs.reasoning.scene_prompts import parse_scene_source, scene_problems
from envs.reasoning.solutions import worked_solution
from envs.reasoning.verify import CHECKS
from models.errors import UserError, unknown_name
from models.seeding import derive_seed

log = logging.getLogger(__name__)

_CHUNK = 512  # reasoning-gym items drawn from one seed; fixed, so that a longer load begins with a shorter one


_SCENE_TRIES = 20  # scenes drawn for each one that is wanted


_SURROGATE = re.compile("[\ud800-\udfff]")


def is_generated(spec: str) -> bool:
    """Whether the source has no end."""
    return spec.startswith(("gym:", "scene:"))


def load_problems(spec: str, count: int | None, seed: int, exclude: Iterable[Problem] = ()) -> list[Problem]:
    """Load `count` problems whose prompts are distinct and not among those of `exclude`.

    spec: `gym:FAMILY?param=value&...`, `scene:prompt?param=value&...`, or a path to a `.jsonl` or `.parquet` file with
    the string fields `prompt` and `answer` and optionally `solution`, `id`, `verifier` (`math`, the default, or
    `exact`) and the number `difficulty`.
    count: None is the whole file; a number draws that many, in an order given by `seed`. Generated sources need one.
    Ids: `gym:FAMILY?...@SEED#N`, `scene:prompt?...@SEED#N`, and of a file its path with the problem's own id, which
    another file may use too, or else with the line: `data/train.jsonl#own`, `data/train.jsonl:12`.

    The same arguments give the same problems in the same order, and a longer load of a generated source begins with a
    shorter one. Raises UserError for whatever cannot be read, and if there are fewer than `count` such problems.
    """
    if count is not None and count < 1:
        raise UserError(f"{count} problems of `{spec}` asked for: ask for at least 1")
    excluded = {problem.prompt for problem in exclude}
    if spec.startswith("gym:"):
        return _load_gym(spec, count, seed, excluded)
    if spec.startswith("scene:"):
        return _load_scenes(spec, count, seed, excluded)
    rows = {".jsonl": _rows_of_jsonl, ".parquet": _rows_of_parquet}.get(Path(spec).suffix)
    if rows is None:
        raise UserError(
            f"problems `{spec}`: use gym:FAMILY?param=value, scene:prompt, or a path ending in .jsonl or .parquet"
        )
    return _load_file(Path(spec), rows, count, seed, excluded)


def _load_gym(text: str, count: int | None, seed: int, seen: set[str]) -> list[Problem]:
    spec = gym_dataset.parse_spec(text)
    if count is None:
        raise UserError(f"`{spec}` has no end: say how many problems")
    problems: list[Problem] = []
    chunk = 0
    while len(problems) < count:
        before = len(problems)
        # 31 bits: some datasets hand their seed to numpy's 32-bit generator.
        dataset = gym_dataset.open_dataset(spec, seed=derive_seed(seed, str(spec), chunk) >> 32, size=_CHUNK)
        for index in range(_CHUNK):
            entry = gym_dataset.draw(dataset, index, spec)
            if entry["question"] not in seen:
                seen.add(entry["question"])
                problems.append(_gym_problem(spec, entry, f"{spec}@{seed}#{chunk * _CHUNK + index}"))
                if len(problems) == count:
                    break
        if len(problems) == before:
            raise UserError(
                f"`{spec}` ran out of new questions after {before} of {count}: ask for fewer, or widen its parameters"
            )
        chunk += 1
    return problems


def _load_scenes(text: str, count: int | None, seed: int, seen: set[str]) -> list[Problem]:
    source = parse_scene_source(text)
    if count is None:
        raise UserError(f"`{source}` has no end: say how many problems")
    problems: list[Problem] = []
    for problem in itertools.islice(scene_problems(source, seed), _SCENE_TRIES * count):
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
            if len(problems) == count:
                return problems
    raise UserError(f"`{source}` has too few different scenes for {count} problems: ask for fewer, or more objects")


def _gym_problem(spec: gym_dataset.GymSpec, entry: Mapping[str, Any], id: str) -> Problem:
    return Problem(
        id=id,
        prompt=entry["question"],
        answer=entry["answer"] or "",  # open questions have no single answer; their scorer does without
        verifier="gym",
        solution=worked_solution(spec.family, entry),
        difficulty=gym_dataset.difficulty_of(entry),
        metadata=gym_dataset.pack_entry(spec, entry),
        source=str(spec),
    )


def _load_file(path: Path, rows: Any, count: int | None, seed: int, excluded: set[str]) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"no file `{path}`: check the path of the problems")
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    prompts: set[str] = set()
    empty, repeated, elsewhere = True, 0, 0
    for number, row in rows(path):
        where, empty = f"{path}:{number}", False
        problem = _problem_of_row(row, where, source=str(path))
        if problem.id in origin:
            raise UserError(f"{where}: id `{row['id']}` is taken by {origin[problem.id]}: make ids distinct")
        origin[problem.id] = where
        if problem.prompt in prompts:
            repeated += 1
        elif problem.prompt in excluded:
            elsewhere += 1
        else:
            problems.append(problem)
        prompts.add(problem.prompt)
    if empty:
        raise UserError(f"`{path}` holds no problems: write at least one")
    if repeated:
        log.warning("%s: left out %d problems whose prompts came before", path, repeated)
    if elsewhere:
        log.warning("%s: left out %d problems that are held out, or in a source before it", path, elsewhere)
    if not problems:
        raise UserError(
            f"`{path}`: all its problems are held out, or in a source before it: leave it out or hold out others"
        )
    if count is not None and len(problems) < count:
        raise UserError(f"`{path}` has {len(problems)} usable problems, {count} asked for: ask for fewer")
    if count is not None:
        problems = random.Random(derive_seed(seed, path.name)).sample(problems, count)
    return problems


def _rows_of_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                reason = str(error) or type(error).__name__
                raise UserError(f"{path}:{number}: not JSON ({reason}): each line must be one JSON object") from error


def _rows_of_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in Problem.__dataclass_fields__]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"cannot read `{path}` as Parquet ({error}): is the file complete?") from error


def _problem_of_row(row: Any, where: str, source: str) -> Problem:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}: each problem must be an object with `prompt` and `answer`")

    def text(name: str) -> str | None:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: `{name}` is {type(value).__name__}, not a string: quote it")
        if value is not None and _SURROGATE.search(value):  # JSON can spell half a character, and no tokenizer reads it
            raise UserError(f"{where}: `{name}` holds a lone surrogate, half of a character: write the whole one")
        return value

    def required(name: str) -> str:
        value = text(name)
        if value is None:
            raise UserError(f"{where}: `{name}` is missing (there is: {', '.join(map(str, row)) or 'nothing'}): add it")
        if not value.strip():
            raise UserError(f"{where}: `{name}` is empty: fill it in or leave the problem out")
        return value

    difficulty = row.get("difficulty")
    if difficulty is not None and (
        isinstance(difficulty, bool) or not isinstance(difficulty, int | float) or not math.isfinite(difficulty)
    ):
        raise UserError(f"{where}: `difficulty` is `{difficulty}`: must be a finite number")
    verifier = text("verifier") or "math"
    usable = [name for name in CHECKS if name != "gym"]  # which needs the dataset's own entry
    if verifier not in usable:
        error = unknown_name("verifier", verifier, usable)
        raise UserError(f"{where}: {error}")
    own_id = text("id")
    return Problem(
        id=f"{source}#{own_id}" if own_id else where,
        prompt=required("prompt"),
        answer=required("answer"),
        verifier=verifier,
        solution=text("solution"),
        difficulty=None if difficulty is None else float(difficulty),
        source=source,
    )
