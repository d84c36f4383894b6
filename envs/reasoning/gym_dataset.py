"""reasoning-gym (Stojanovski et al., arXiv 2505.24760): any of its datasets by name and parameters, with its scorer.

Item i of a dataset is drawn from `Random(seed + i)`, so datasets whose seeds are near each other share items. Seeds
here come from `derive_seed` and lie far apart; equal questions from small families are caught by their text
(`envs.reasoning.sources`).
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from envs.reasoning.evaluated_answers import is_plain, read_literals_only
from envs.reasoning.lenient_scorers import corrected
from models.errors import UserError, unknown_name

# Set by the caller of `load_problems`, not by the spec.
_NOT_PARAMETERS = ("seed", "size")
# How its datasets reject parameters: mostly `assert`, otherwise whatever the constructor ran into.
_REFUSALS = (AssertionError, ValueError, TypeError, LookupError, OSError, RuntimeError)


@dataclasses.dataclass(frozen=True)
class GymSpec:
    """A family of problems: the dataset's name and the parameters that differ from its defaults."""

    family: str
    params: Mapping[str, Any]

    def __str__(self) -> str:
        query = "&".join(f"{name}={_show(value)}" for name, value in sorted(self.params.items()))
        return f"gym:{self.family}" + (f"?{query}" if query else "")


def parse_spec(spec: str) -> GymSpec:
    """Parse `gym:FAMILY?name=value&...`. Lists are written `a,b,c` or as JSON.

    Raises UserError for an unknown family or parameter (naming the nearest), a value of the wrong type, and a
    combination that the dataset refuses.
    """
    from reasoning_gym.factory import DATASETS  # a second of imports, wanted only where gym problems are

    family, _, query = spec.removeprefix("gym:").partition("?")
    if family not in DATASETS:
        raise unknown_name("reasoning-gym family", family, DATASETS)
    if family == "composite":  # its parts would be scored without the care for answers that are evaluated
        raise UserError("gym:composite is a mix of other families: name each of these as a source of its own")
    fields = {
        field.name: field for field in dataclasses.fields(DATASETS[family][1]) if field.name not in _NOT_PARAMETERS
    }
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise UserError(f"cannot read `{spec}`: write parameters as `gym:{family}?name=value&name=value`") from None
    params = {}
    for name, text in pairs:
        if name in _NOT_PARAMETERS:
            raise UserError(f"`{name}` in `{spec}` is not a parameter: the run's seed and problem count set it")
        if name not in fields:
            raise unknown_name(f"parameter of gym:{family}", name, fields)
        if name in params:
            raise UserError(f"`{name}` appears twice in `{spec}`: keep one")
        params[name] = _parse_value(text, _default_of(fields[name]), f"`{name}` in `{spec}`")
    parsed = GymSpec(family, params)
    open_dataset(parsed, seed=0, size=1)
    return parsed


def open_dataset(spec: GymSpec, seed: int, size: int) -> Any:
    """Build the dataset. Raises UserError where its own validation refuses the parameters."""
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(spec.family, seed=seed, size=size, **spec.params)
    except _REFUSALS as error:
        raise UserError(f"reasoning-gym refuses `{spec}` ({error}): change its parameters") from error


def draw(dataset: Any, index: int, spec: GymSpec) -> dict[str, Any]:
    """Draw one item. Raises UserError where parameters that passed validation cannot be drawn from."""
    try:
        return dataset[index]
    except _REFUSALS as error:
        raise UserError(f"reasoning-gym cannot draw from `{spec}` ({error}): change its parameters") from error


def difficulty_of(entry: Mapping[str, Any]) -> float | None:
    """One number that grows with difficulty: the mean of log2(1 + |size|) over the sizes that the dataset names.

    `metadata["difficulty"]` names them (`num_terms`, `num_digits`, ...). A size is the instance's own where its
    metadata gives one under that name (a list counts its elements), otherwise the middle of the configured range. The
    logarithm puts a range of values up to 1000 and a number of terms on one scale.
    """
    metadata = entry["metadata"]
    named = metadata.get("difficulty")
    if not isinstance(named, Mapping):
        named = {"difficulty": named}
    sizes = []
    for name, configured in named.items():
        own = metadata.get(name) if name != "difficulty" else None
        size = _size(own, of_range=False)
        if size is None:
            size = _size(configured, of_range=True)
        if size is not None:
            sizes.append(math.log2(1 + abs(size)))
    return sum(sizes) / len(sizes) if sizes else None


def pack_entry(spec: GymSpec, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `score` needs, as plain JSON data."""
    return {"family": spec.family, "params": _pack(dict(spec.params)), "entry": _pack(dict(entry))}


def score(answer: str, packed: Mapping[str, Any]) -> float:
    """The dataset's own score of an answer, in [0, 1]; 0 for one that it would evaluate and that is more than a sum, a
    formula or a list (`envs.reasoning.evaluated_answers`), and no more than a wrong one's for one that is right
    whatever the question (`envs.reasoning.lenient_scorers`)."""
    if not is_plain(packed["family"], answer, packed["entry"]["answer"] or ""):
        return 0.0
    dataset = _scorer(packed["family"], json.dumps(packed["params"], sort_keys=True))
    entry = _unpack(packed["entry"])
    return corrected(float(dataset.score_answer(answer, entry)), packed["family"], answer, entry)


def warm_up(answer: str, packed: Mapping[str, Any]) -> None:
    """Import reasoning-gym, build the dataset, and once score an answer that is not the policy's, for what its scorer
    loads and caches."""
    importlib.import_module("reasoning_gym")
    key = (packed["family"], str(packed["params"]))
    if key not in _warm and is_plain(packed["family"], answer, answer):  # what is not plain warms nothing up
        _warm.add(key)
        with contextlib.suppress(Exception):  # an open question has no answer of its own
            score(answer, packed)


_warm: set[tuple[str, str]] = set()


@functools.lru_cache(maxsize=64)
def _scorer(family: str, params: str) -> Any:
    dataset = open_dataset(GymSpec(family, _unpack(json.loads(params))), seed=0, size=1)
    read_literals_only(family, dataset)
    return dataset


def _size(value: Any, of_range: bool) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple):
        if not of_range:
            return float(len(value))
        if len(value) == 2 and all(isinstance(bound, int | float) for bound in value):
            return sum(abs(bound) for bound in value) / 2
    return None


def _default_of(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _parse_value(text: str, default: Any, where: str) -> Any:
    """Read `text` as the type of `default`; without one, as JSON if it is JSON and as a string otherwise."""
    if isinstance(default, str):
        return text
    value: Any = text
    try:
        value = json.loads(text.lower() if text in ("True", "False", "None") else text)
    except json.JSONDecodeError:
        if isinstance(default, list | tuple) or (default is None and "," in text):
            value = [_parse_value(part, None, where) for part in text.split(",")]
    if isinstance(default, list | tuple):
        return type(default)(value if isinstance(value, list) else [value])
    matches = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
    }
    if not matches.get(type(default), True):
        raise UserError(f"{where} is `{text}`: must be {type(default).__name__}, e.g. {_show(default)}")
    return value


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_show, value))
    return value if isinstance(value, str) else json.dumps(value)


# JSON has no tuples and only string keys, and some scorers compare with `==` against tuples: both are tagged.
_TUPLE, _PAIRS = "(tuple)", "(pairs)"


def _pack(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item) for item in value]}
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {str(key): _pack(item) for key, item in value.items()}
        return {_PAIRS: [[_pack(key), _pack(item)] for key, item in value.items()]}
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # numpy's strings and floats are subclasses of these
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a {type(value).__name__} in a reasoning-gym entry has no JSON form")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(_unpack(item) for item in value[_TUPLE])
        if value.keys() == {_PAIRS}:
            return {_unpack(key): _unpack(item) for key, item in value[_PAIRS]}
        return {key: _unpack(item) for key, item in value.items()}
    return value
