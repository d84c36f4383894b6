import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from launch import seeds
from launch.cli import main
from launch.console import RunConsole
from launch.run_directory import RunDirectory
from tests.launch.processes import is_gone

COUNTING = "tests.envs.control.environments:Counting-v0"
SETTINGS = ["--env", COUNTING, "--steps", "600", "--eval-every", "200", "--eval-episodes", "2", "--backend", "local"]


def command(path: Path, *more: str) -> list[str]:
    return ["train", "a2c", *SETTINGS, "--runs-dir", str(path), "--name", "many", "--seeds", "2", *more]


def test_seeds_are_runs_of_their_own_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    assert main(command(tmp_path, "--seed", "3", "--seeds-at-once", "2")) == 0
    folder = tmp_path / "many"
    for seed in (3, 4):
        assert yaml.safe_load((folder / f"seed-{seed}" / "config.yaml").read_text())["seed"] == seed
    found = json.loads((folder / "aggregate.json").read_text())
    assert found["seeds"] == [3, 4]
    figures = found["metrics"]["eval/return_mean"]
    assert figures["mean"] == pytest.approx(np.mean(figures["values"]))
    assert "eval/return_std" not in found["metrics"]
    assert (folder / "curves.png").stat().st_size > 1000

    written = (folder / "seed-3" / "metrics.jsonl").read_text()
    summary = folder / "seed-4" / "summary.json"
    killed = json.loads(summary.read_text()) | {"status": "running"}
    summary.write_text(json.dumps(killed))
    (folder / "aggregate.json").unlink()
    assert main(command(tmp_path, "--seed", "3")) == 0
    assert json.loads(summary.read_text())["status"] == "finished"
    assert (folder / "seed-3" / "metrics.jsonl").read_text() == written
    assert json.loads((folder / "aggregate.json").read_text()) == found


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "recipe.yaml").write_text("job: a2c\nsteps: 5\n")
    assert main(command(tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'many'} holds runs with other settings (" in said
    assert "steps was 5, not 600" in said
    assert main(["train", "a2c", "--seeds", "0"]) == 2


def test_a_setting_that_a_later_version_added_does_not_keep_seeds_from_going_on(tmp_path: Path) -> None:
    assert main(command(tmp_path)) == 0
    recipe = tmp_path / "many" / "recipe.yaml"
    written = recipe.read_text()
    older = "".join(line for line in written.splitlines(keepends=True) if not line.startswith("max_grad_norm: "))
    assert older != written
    recipe.write_text(older)
    assert main(command(tmp_path)) == 0
    assert recipe.read_text() == written


def test_a_seed_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raising = ["--env", "tests.envs.control.environments:Raising"]
    assert main([*command(tmp_path), *raising]) == 2
    out = capsys.readouterr().out
    assert "seed 0: failed with exit code 2: longstride: environment" in out
    assert "ZeroDivisionError" in out
    assert not (tmp_path / "many" / "aggregate.json").exists()


def test_seeds_that_are_all_refused_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path), "--env", "Nope-v0"]) == 2
    assert "seed 1: failed with exit code 2: longstride: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_seeds_said_that_ended_before_they_were_runs_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "_command", lambda *_: ["sh", "-c", "echo Traceback; exit 1"])
    assert main(command(tmp_path)) == 1
    assert (tmp_path / "many" / "seed-0.log").read_text() == "Traceback\n"


def test_a_seed_that_is_killed_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(job: str, folder: Path, seed: int) -> list[str]:
        directory = RunDirectory.create(folder, f"seed-{seed}", {"job": job})
        directory.write_summary({"status": "running" if seed else "finished", "metrics": {"eval/a": 1.0}})
        directory.metrics.touch()
        return ["sh", "-c", "kill -9 $$" if seed else "exit 0"]

    monkeypatch.setattr(seeds, "_command", commands)
    assert main(command(tmp_path)) == 128 + signal.SIGKILL
    said = capsys.readouterr().out
    assert "seed 1: ended by SIGKILL; its last line: it said nothing" in said
    assert "many: 1 seeds, without 1" in said
    found = json.loads((tmp_path / "many" / "aggregate.json").read_text())
    assert (found["seeds"], found["missing"]) == ([0], [1])


def begun(path: Path) -> "tuple[subprocess.Popen[bytes], list[RunDirectory]]":
    """Two long seeds at once that have logged, in a process group as a terminal has it."""
    settings = ["--steps", "1000000", "--log-every", "100", "--seeds-at-once", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *command(path, *settings)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    directories = [RunDirectory(path / "many" / f"seed-{seed}") for seed in range(2)]
    while not all(directory.has_begun() for directory in directories):
        assert process.poll() is None
        time.sleep(0.05)
    return process, directories


def test_one_interrupt_at_the_terminal_ends_all_seeds_in_order(tmp_path: Path) -> None:
    process, directories = begun(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert [directory.read_summary()["status"] for directory in directories] == ["interrupted"] * 2


def test_seeds_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process, directories = begun(tmp_path)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.wait()
    assert all(map(is_gone, children))
    assert [directory.read_summary()["status"] for directory in directories] == ["interrupted"] * 2


def test_only_what_all_seeds_have_is_aggregated(tmp_path: Path) -> None:
    finished = {0: {"eval/a": 1.0, "eval/b": 2.0, "train/c": 1.0}, 1: {"eval/a": 3.0, "train/c": 1.0}}
    for seed in finished:
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "metrics.jsonl").write_text('{"step": 1, "eval/a": 2}\n{"step": 2, "ev')
    seeds.report("a2c", tmp_path, finished, [], RunConsole("x"))
    assert list(json.loads((tmp_path / "aggregate.json").read_text())["metrics"]) == ["eval/a"]
    assert (tmp_path / "curves.png").exists()
