import math
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.sweep_space import Dimension, read_space, with_values
from models.errors import UserError

ENTRIES = {"lr": 1e-3, "n_steps": 8, "hidden": [64, 64], "sft": {"steps": 5, "lr": 0.1}}


def read(tmp_path: Path, text: str, check: Any = lambda entries: None) -> dict[str, Dimension]:
    (tmp_path / "space.yaml").write_text(text)
    return read_space(str(tmp_path / "space.yaml"), ENTRIES, check)


def test_ranges_and_choices(tmp_path: Path) -> None:
    checked = []
    text = "lr: {low: 1.0e-4, high: 1, log: true}\nn_steps: {low: 1, high: 4}\nhidden: {choices: [[32], [64, 64]]}\n"
    space = read(tmp_path, text + "sft.steps: {choices: [1, 2]}", checked.append)
    assert space == {
        "lr": Dimension(1e-4, 1, log=True),
        "n_steps": Dimension(1, 4),
        "hidden": Dimension(choices=((32,), (64, 64))),
        "sft.steps": Dimension(choices=(1, 2)),
    }
    assert not space["lr"].whole
    assert space["n_steps"].whole
    assert [dimension.count for dimension in space.values()] == [math.inf, 4, 2, 2]
    assert [entries["sft"]["steps"] for entries in checked] == [5] * 6 + [1, 2]
    assert ENTRIES["sft"] == {"steps": 5, "lr": 0.1}


def test_values_are_put_into_nested_settings() -> None:
    changed = with_values(ENTRIES, {"sft.lr": 0.5, "hidden": (1, 2)})
    assert changed == {**ENTRIES, "hidden": [1, 2], "sft": {"steps": 5, "lr": 0.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: {low: 0.1, high: 1.0}", "unknown setting in .*space.yaml `lrr`: did you mean `lr`"),
        ("lr: {low: 1e-4, high: 1e-2}", "lr: low and high must be numbers.*write 1.0e-4"),
        ("lr: {low: 2.0, high: 1.0}", "lr: 2.0 to 1.0 is no range"),
        ("lr: {low: 0.0, high: 1.0, log: true}", "0.0 to 1.0 is no range on a logarithmic scale"),
        ("lr: {low: 0.1}", "lr: give {low: ..., high: ...}"),
        ("lr: {low: 0.1, high: 1.0, choices: [1]}", "lr: give {low"),
        ("lr: 3", "lr: give {low"),
        ("lr: {choices: []}", "choices must be a list of values"),
        ("hidden: {choices: [[8], [8]]}", "hidden: .8. is there twice among the choices"),
        ("- lr", "must hold lines such as"),
        ("lr: {", "cannot read --space"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_limit_that_the_job_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("n_steps: {low: 0, high: 4}")
    command = ["sweep", "a2c", "--recipe", "a2c-cartpole", "--runs-dir", str(tmp_path / "runs")]
    assert main([*command, "--space", str(space)]) == 2
    assert "n_steps" in capsys.readouterr().err.replace("-", "_")
    assert main(command) == 2
    assert "a sweep needs --space FILE" in capsys.readouterr().err
    assert main([*command, "--space", str(space), "--trials", "0"]) == 2
    assert "--trials is 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
