"""What a sweep tries: a YAML file that gives settings of the job a range or a list of choices.

lr: {low: 1.0e-4, high: 1.0e-2, log: true}
n_steps: {choices: [8, 16, 32]}
segments: {low: 1, high: 8}                 # both whole numbers: so is every value, `high` among them
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from models.errors import UserError, unknown_name


@dataclass(frozen=True)
class SweepOptions:
    """Flags of `longstride sweep` that are not part of a run's configuration."""

    recipe: str = ""
    """YAML file, or the name of a recipe that comes with longstride: what all trials share."""
    space: str = ""
    """YAML file with the settings to vary."""
    metric: str = "eval/return_mean"
    """Metric of the runs that says how good a trial is: its last value."""
    mode: Literal["max", "min"] = "max"
    trials: int = 20
    trials_at_once: int = 1
    search: Literal["optuna", "random"] = "optuna"
    """optuna: a tree-structured Parzen estimator proposes each trial from those before. random: all independent."""
    early_stopping: bool = False
    """Stop trials that do worse than half of the others had done after as many values of the metric (ASHA)."""

    def __post_init__(self) -> None:
        for name in ("trials", "trials_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Dimension:
    """One setting: numbers from `low` to `high`, or one of `choices`."""

    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def count(self) -> float:
        """Of the values; infinite for a range of real numbers."""
        if self.choices:
            return len(self.choices)
        return self.high - self.low + 1 if self.whole else math.inf

    @property
    def limits(self) -> tuple[Any, ...]:
        """Values that must all be good settings."""
        return self.choices or (self.low, self.high)


def read_space(
    path: str, entries: Mapping[str, Any], check: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Dimension]:
    """Read the file. entries: the job's settings; check: raises UserError for settings that cannot be.

    Raises UserError for a file that cannot be read, an unknown setting, and a range that is none or goes too far.
    """
    if not path:
        raise UserError("a sweep needs --space FILE, a YAML file such as  lr: {low: 1.0e-4, high: 1.0e-2, log: true}")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read --space {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--space {path}: must hold lines such as  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}")
    known = dict(_dotted(entries))
    space = {}
    for name, value in content.items():
        name = str(name).replace("-", "_")
        if name not in known:
            raise unknown_name(f"setting in {path}", name, known)
        space[name] = dimension = _dimension(value, f"{path}: {name}")
        for limit in dimension.limits:
            check(with_values(entries, {name: limit}))
    return space


def with_values(entries: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with some of them, by their dotted names, changed."""
    changed = copy.deepcopy(dict(entries))
    for name, value in values.items():
        *sections, last = name.split(".")
        section = changed
        for key in sections:
            section = section[key]
        section[last] = list(value) if isinstance(value, tuple) else value
    return changed


def _dimension(value: Any, where: str) -> Dimension:
    known = {"low", "high", "log", "choices"}
    if (
        not isinstance(value, dict)
        or not set(value) <= known
        or not ({"low", "high"} <= set(value)) ^ ("choices" in value)
    ):
        raise UserError(f"{where}: give {{low: ..., high: ...}}, with log: true if need be, or {{choices: [...]}}")
    if "choices" in value:
        if not isinstance(value["choices"], list) or not value["choices"]:
            raise UserError(f"{where}: choices must be a list of values")
        choices = [tuple(c) if isinstance(c, list) else c for c in value["choices"]]
        for i, choice in enumerate(choices):
            if choice in choices[:i]:
                raise UserError(f"{where}: {value['choices'][i]} is there twice among the choices")
        return Dimension(choices=tuple(choices))
    low, high, log = value["low"], value["high"], value.get("log", False)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high)) or not isinstance(
        log, bool
    ):
        hint = "; YAML reads 1e-4 as text: write 1.0e-4" if isinstance(low, str) or isinstance(high, str) else ""
        raise UserError(f"{where}: low and high must be numbers, and log true or false{hint}")
    if not low < high or (log and low <= 0):
        raise UserError(f"{where}: {low} to {high} is no range{' on a logarithmic scale' if log else ''}")
    return Dimension(low, high, log)


def _dotted(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in entries.items():
        found += _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found
