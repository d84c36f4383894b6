import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.sweep_optuna import UntriedOptuna
from launch.sweep_search import Untried, domain
from launch.sweep_space import Dimension

pytestmark = pytest.mark.ray
ENVIRONMENTS = "tests.envs.control.environments"
SPACE = (
    "lr: {low: 1.0e-4, high: 1.0e-2, log: true}\nn_steps: {choices: [4, 8]}\nsegments: {low: 1, high: 3}\n"
    + "hidden: {choices: [[8], [8, 8]]}\n"
)


def command(path: Path, env: str, trials: int, space: str = SPACE) -> list[str]:
    (path / "space.yaml").write_text(space)
    settings = ["--env", f"{ENVIRONMENTS}:{env}", "--steps", "600", "--eval-every", "200", "--eval-episodes", "2"]
    where = ["--backend", "local", "--runs-dir", str(path), "--name", "s", "--space", str(path / "space.yaml")]
    return ["sweep", "a2c", *settings, *where, "--trials", str(trials), "--trials-at-once", "2"]


def longstride(arguments: list[str]) -> tuple[int, str]:
    """A process of its own, since this one may have a Ray cluster already. Returns its exit code and what it said."""
    done = subprocess.run([sys.executable, "-m", "launch", *arguments], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_a_sweep_and_its_continuation(tmp_path: Path) -> None:
    code, said = longstride(command(tmp_path, "Counting-v0", 2))
    assert code == 0, said
    folder = tmp_path / "s"
    first = json.loads((folder / "trials.json").read_text())
    assert len(first) == 2
    assert first[0]["value"] >= first[1]["value"]
    for trial in first:
        assert 1e-4 <= trial["settings"]["lr"] <= 1e-2
        assert trial["settings"]["n_steps"] in (4, 8)
        assert trial["settings"]["segments"] in (1, 2, 3)
        assert trial["settings"]["hidden"] in ([8], [8, 8])
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert {name: best[name] for name in first[0]["settings"]} == first[0]["settings"]
    assert best["job"] == "a2c"

    # As a kill leaves it: one run has not ended, and its result was never written.
    stopped = next(path for path in (folder / "trials").glob("*.json"))
    stopped.unlink()
    summary = stopped.with_suffix("") / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
    code, said = longstride(command(tmp_path, "Counting-v0", 3))
    assert code == 0, said
    assert said.count(": eval/return_mean ") == 2  # the resumed one and the new one
    again = json.loads((folder / "trials.json").read_text())
    assert len(again) == 3
    assert all(trial in again for trial in first)
    assert json.loads(summary.read_text())["status"] == "finished"

    code, said = longstride([*command(tmp_path, "Counting-v0", 3), "--mode", "min"])
    assert code == 2
    assert "holds a sweep with other settings (mode was max, not min)" in said


def test_trials_that_fail_are_told(tmp_path: Path) -> None:
    code, said = longstride(command(tmp_path, "Raising", 1))
    assert code == 2
    assert "1 of the trials failed; the first:" in said
    assert "ZeroDivisionError" in said
    code, said = longstride([*command(tmp_path, "Counting-v0", 1), "--name", "t", "--metric", "eval/nothing"])
    assert code == 2
    assert "the run wrote no eval/nothing; it has eval/" in said


def test_a_sweep_ends_when_everything_was_tried(tmp_path: Path) -> None:
    code, said = longstride(command(tmp_path, "Counting-v0", 5, "n_steps: {choices: [4, 8]}"))
    assert code == 0, said
    assert "the space has 2 different settings: 2 trials, not 5" in said
    assert said.count(": eval/return_mean ") == 2  # none of them twice
    assert len(json.loads((tmp_path / "s" / "trials.json").read_text())) == 2


def test_no_more_trials_at_once_than_asked_for(tmp_path: Path) -> None:
    """Neither of those drawn at random, nor of those that an interrupted sweep had begun."""
    arguments = [*command(tmp_path, "Counting-v0", 2), "--search", "random", "--trials-at-once", "1"]
    for _ in range(2):
        code, said = longstride(arguments)
        assert code == 0, said
        spans = []
        for path in (tmp_path / "s" / "trials").glob("*.json"):
            files = path.with_suffix(".yaml"), path.with_suffix("") / "summary.json"  # its first and its last
            spans.append([file.stat().st_mtime for file in files])
            path.unlink()  # as if the sweep had been interrupted
            shutil.rmtree(path.with_suffix(""))
        (_, first_ends), (second_begins, _) = sorted(spans)
        assert first_ends <= second_begins


def test_no_settings_are_drawn_twice() -> None:
    space = {"a": Dimension(choices=(1, 2, (3,))), "b": Dimension(1, 2)}
    untried = Untried(space, 0, str, {str({"a": 1, "b": 2})})
    drawn = [untried.draw() for _ in range(5)]
    assert len(set(map(str, drawn))) == 5
    assert {"a": 1, "b": 2} not in drawn
    assert {"a": "[3]", "b": 1} in drawn


def test_optuna_proposes_nothing_twice() -> None:
    space = {"a": Dimension(choices=(1, 2, 3)), "b": Dimension(1, 3)}
    untried = Untried(space, 0, lambda settings: str(sorted(settings.items())), set())
    search = UntriedOptuna(untried, space={k: domain(d) for k, d in space.items()}, metric="x", mode="max", seed=0)
    proposed = []
    for number in range(9):
        proposed.append(settings := search.suggest(str(number)))
        search.on_trial_complete(str(number), {"x": float(settings == {"a": 1, "b": 1})})
    assert len(set(map(str, proposed))) == 9
