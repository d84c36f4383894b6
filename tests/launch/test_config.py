import dataclasses
import io
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from launch.config import RunConfig, apply_entries, as_entries, combine, parse, read_recipe
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    quick: bool = False
    cold: bool = True


@dataclasses.dataclass(frozen=True)
class JobConfig:
    steps: int = 3
    model: Path | None = None
    kind: Literal["dense", "moe"] = "dense"
    layers: tuple[str, ...] = ("softmax",)
    window: tuple[int, int] = (1, 2)
    rl: Inner = Inner()


COMBINED = combine("Test", run=RunConfig, job=JobConfig)


def apply(entries: dict[str, Any]) -> Any:
    return apply_entries(COMBINED, entries, "recipe r")


def flags(*arguments: str, default: Any = None) -> Any:
    return parse(COMBINED, arguments, default, source="train test", prog="longstride")


def test_the_later_of_defaults_recipe_and_flags_wins() -> None:
    recipe = apply({"steps": 5, "rl": {"lr": 0.5, "quick": True}})
    config = flags("--rl.lr", "0.25", "--seed", "7", default=recipe)
    assert config.job == JobConfig(steps=5, rl=Inner(lr=0.25, quick=True))
    assert config.run == RunConfig(seed=7)


def test_every_kind_of_field_can_be_set_from_a_recipe() -> None:
    entries = yaml.safe_load(
        """
        runs-dir: elsewhere
        model: folder/with space
        kind: moe
        layers: [linear, softmax]
        window: [3, 4]
        rl: {lr: 1e-5, quick: true, cold: false}
        """
    )
    config = apply(entries)
    assert config.run.runs_dir == Path("elsewhere")
    rl = Inner(lr=1e-5, quick=True, cold=False)  # YAML reads 1e-5 as text
    assert config.job == JobConfig(3, Path("folder/with space"), "moe", ("linear", "softmax"), (3, 4), rl)


def test_a_written_config_reads_back_as_itself() -> None:
    config = flags("--model", "m", "--layers", "--rl.no-cold", "--name", "3", "--rl.lr", "1e-7")
    assert config.job.layers == ()
    assert apply(yaml.safe_load(yaml.safe_dump(as_entries(config)))) == config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"stpes": 5}, "recipe r: unknown key stpes: did you mean steps?"),
        ({"lr": 1.0}, "recipe r: unknown key lr: did you mean rl.lr?"),
        ({"rl": {"lrr": 1.0}}, "recipe r: unknown key rl.lrr: did you mean rl.lr?"),
        ({"rl": 3}, "recipe r: unknown key rl: did you mean"),
        ({"steps": "many"}, "recipe r: --steps: invalid literal"),
        ({"steps": 1.5}, "recipe r: --steps: invalid literal"),
        ({"steps": True}, "recipe r: steps is True, but must be of type int"),
        ({"steps": None}, "recipe r: steps is None, but must be of type int"),
        ({"steps": [1, 2]}, "recipe r: unexpected argument '2'"),
        ({"rl": {"quick": 1}}, "recipe r: rl.quick is 1, but must be of type bool"),
        ({"kind": "sparse"}, "recipe r: invalid choice 'sparse' for argument '--kind'"),
        ({"window": [1]}, "recipe r: Missing value for argument '--window'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    ],
)
def test_a_bad_entry_is_named(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply(entries)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpes", "5"], "train test: unknown flag --stpes: did you mean --steps?"),
        (["--run-dir=x"], "train test: unknown flag --run-dir: did you mean --runs-dir?"),
        (["--lr", "1"], "train test: unknown flag --lr: did you mean --rl.lr?"),
        (["steps=5"], "train test: unexpected argument 'steps=5'"),
        (["--steps", "many"], "train test: --steps: invalid literal"),
        (["--steps"], "train test: Missing value for argument '--steps'"),
        (["--device", "tpu"], "train test: invalid choice 'tpu' for argument '--device'"),
    ],
)
def test_a_bad_flag_is_named(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, encoding: str
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # tyro draws its frames accordingly
    with pytest.raises(UserError) as caught:
        flags(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_help_shows_the_recipe_s_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        flags("--help", default=apply({"steps": 77}))
    assert not stop.value.code
    assert "77" in capsys.readouterr().out


def test_a_job_may_not_redefine_what_every_run_has() -> None:
    clash = dataclasses.make_dataclass("Clash", [("seed", int, 1)])
    with pytest.raises(TypeError, match="seed"):
        combine("Test", run=RunConfig, job=clash)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "is not a recipe"),
        ("a: [1, 2\n", "cannot read the recipe"),
        ("a: !!python/object/apply:os.getcwd []\n", "cannot read the recipe"),
        ("job: a2c\n", "is a recipe for the job a2c"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_recipe(str(path), "reason")
    assert "\n" not in str(caught.value)


def test_recipes_that_come_along_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.config.RECIPES", tmp_path)
    (tmp_path / "quickstart.yaml").write_text("job: reason\nsteps: 4\n")
    assert read_recipe("quickstart", "reason") == {"steps": 4}
    with pytest.raises(UserError, match="did you mean quickstart"):
        read_recipe("quikstart", "reason")
