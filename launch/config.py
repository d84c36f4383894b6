"""From defaults, a YAML recipe and command-line flags to one dataclass; the later of the three wins.

Everything goes through tyro's parser, a recipe too (its entries become flags), so there is one set of type rules.
Whatever is wrong becomes one UserError line that names the key.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from models.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every job has."""

    name: str = ""
    """Name of the run and of its folder. Empty: the job and the time."""
    runs_dir: Path = Path("runs")
    """Folder that holds the run directories."""
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["ray", "local"] = "ray"
    """ray: actors are processes. local: everything in this process, for debugging."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside the best one."""
    ray_address: str = ""
    """Join this Ray cluster (host:port, or `auto`). Empty: start one on this machine, on loopback."""

    def __post_init__(self) -> None:
        if self.keep_checkpoints < 1:
            raise UserError(f"keep_checkpoints is {self.keep_checkpoints}: keep at least 1, or the run cannot resume")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Flags of `longstride train` that are not part of the run's configuration."""

    recipe: str = ""
    """YAML file, or the name of a recipe that comes with longstride."""
    dry_run: bool = False
    """Print the resolved configuration and the job's placement plan, if it has one, and stop. Refuses a name that is
    taken, and what the job refuses before it starts its actors."""
    seeds: int = 1
    """Train this many seeds, from --seed on, each as a run of its own below runs/<name>/, and aggregate them."""
    seeds_at_once: int = 1

    def __post_init__(self) -> None:
        if min(self.seeds, self.seeds_at_once) < 1:
            raise UserError("--seeds and --seeds-at-once must be at least 1")


def combine(title: str, **parts: type) -> type:
    """One dataclass with the given dataclasses as attributes, whose flags stand side by side without a prefix."""
    names = [name for part in parts.values() for name in field_types(part)]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise TypeError(f"{title}: a job's configuration may not redefine {sorted(repeated)}")
    fields = [
        (name, Annotated[part, tyro.conf.arg(name="")], dataclasses.field(default_factory=part))
        for name, part in parts.items()
    ]
    return dataclasses.make_dataclass(title, fields, frozen=True)


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map each dotted key of a nested dataclass to its type."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found.update(field_types(typing.cast(type, hint), f"{prefix}{field.name}."))
        else:
            found[f"{prefix}{field.name}"] = hint
    return found


def parse(
    combined: type, arguments: Sequence[str], default: Any = None, *, source: str, prog: str, in_part: bool = False
) -> Any:
    """Parse flags over `default` (an instance of `combined`, a result of `combine`).

    source: what the flags came from, for the message. in_part: other flags stand among them, and the help is theirs.
    Raises UserError for an unknown flag or a bad value, and SystemExit(0) after printing the help.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                combined,
                args=arguments,
                default=default if default is not None else combined(),
                prog=prog,
                return_unknown_args=True,
                add_help=not in_part,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{source}: {_sentence(complaint.getvalue())}") from None
    if unknown and not in_part:
        _refuse_unknown(unknown[0], combined, source)
    return config


def _refuse_unknown(token: str, combined: type, source: str) -> typing.NoReturn:
    if not token.startswith("-"):
        raise UserError(f"{source}: unexpected argument {token!r}: every setting is given as --name value")
    key = token.lstrip("-").partition("=")[0].replace("-", "_")
    raise UserError(f"{source}: unknown flag {_flag(key)}: did you mean {_flag(nearest(key, _keys(combined)))}?")


def _keys(combined: type) -> list[str]:
    """The dotted keys of a combined dataclass, without the names of its parts."""
    return [key for field in dataclasses.fields(combined) for key in field_types(_part_type(field))]


def _part_type(field: dataclasses.Field) -> type:
    return typing.get_args(field.type)[0]


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _sentence(box: str) -> str:
    """tyro's complaint without its title, frame, help text and line breaks. The frame depends on the terminal."""
    lines = [line for line in box.splitlines() if not line.startswith("╭")]
    groups = itertools.groupby(lines, key=lambda line: bool(re.search(r"\w", line)))
    sections = [" ".join(line.strip("│ ") for line in group) for has_words, group in groups if has_words]
    return re.sub(r"^Error parsing ", "", sections[0 if "╭" in box else 1])


def read_recipe(name: str, job: str | None) -> dict[str, Any]:
    """Read a recipe file, or one that comes with longstride; return its entries without `job`.

    With job None it may be written for any, and `job` stays among the entries if it is there. Raises UserError if
    there is none of that name, if it is not a YAML mapping, or is written for another job.
    """
    path = Path(name)
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        hint = f"did you mean {nearest(name, known)}? There are: {', '.join(known)}" if known else "none comes along"
        raise UserError(f"--recipe {name}: neither a file nor the name of a recipe; {hint}")
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not a recipe: it must hold `key: value` lines")
    if job is None:
        return entries
    written_for = entries.pop("job", job)
    if written_for != job:
        raise UserError(f"{path} is a recipe for the job {written_for}: run `longstride train {written_for}`")
    return entries


def apply_entries(combined: type, entries: Mapping[str, Any], source: str) -> Any:
    """Return an instance of `combined` with a recipe's entries applied. Raises UserError naming a bad key."""
    types_of = {
        key: hint for field in dataclasses.fields(combined) for key, hint in field_types(_part_type(field)).items()
    }
    flags: list[str] = []
    for key, value in leaves(entries):
        if key not in types_of:
            raise UserError(f"{source}: unknown key {key}: did you mean {nearest(key, types_of)}?")
        flags += _as_flags(key, value, types_of[key], source)
    return parse(combined, flags, source=source, prog="longstride")


def leaves(entries: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of nested entries with their full names: `optimizer.lr`."""
    for name, value in entries.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, Mapping):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _as_flags(key: str, value: Any, hint: Any, source: str) -> list[str]:
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if isinstance(value, bool) != (bool in accepted) or (value is None and types.NoneType not in accepted):
        name = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
        raise UserError(f"{source}: {key} is {value!r}, but must be of type {name}")
    if isinstance(value, bool):
        parent, dot, name = key.rpartition(".")
        return [_flag(key if value else f"{parent}{dot}no_{name}")]
    if isinstance(value, list):
        return [_flag(key), *map(str, value)]
    return [f"{_flag(key)}={value}"]


def default_entries(job_config: type) -> dict[str, Any]:
    """What a run of a job has if nothing is set."""
    return as_entries(combine("Defaults", run=RunConfig, job=job_config)())


def as_entries(config: Any) -> dict[str, Any]:
    """The entries of a combined config in the form of a recipe: plain data, nested like the dataclasses."""
    return {
        name: value
        for field in dataclasses.fields(config)
        for name, value in _plain(getattr(config, field.name)).items()
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
