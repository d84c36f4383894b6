"""What is left of runs that are killed, interrupted, or meet a full disk. Each run is a process of its own."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from launch.checkpoint import CheckpointStore
from launch.run_directory import RunDirectory
from tests.launch.processes import is_gone

ROOT = Path(__file__).parent.parent.parent
LIMIT = 120  # seconds; nothing here takes that long unless it hangs
COMMAND = (sys.executable, "-m", "tests.launch.demo_job")


def spawn(*arguments: str, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*before, *COMMAND, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def await_steps(directory: RunDirectory, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until the run has written `count` steps (or its process has ended)."""
    deadline = time.monotonic() + LIMIT
    while not directory.metrics.exists() or directory.metrics.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "no progress"
        if process.poll() is not None:
            return
        time.sleep(0.01)


def history(directory: RunDirectory) -> list[dict]:
    """The metrics of each step, without clock times and counts of accidents."""
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in {"time", "run/actor_restarts"}} for line in lines]


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def final_state(directory: RunDirectory) -> dict:
    checkpoint = CheckpointStore(directory.checkpoints, keep=1).newest()
    assert checkpoint is not None
    return checkpoint.load()


def assert_equal_runs(killed: RunDirectory, reference: RunDirectory) -> None:
    assert killed.read_summary()["status"] == "finished"
    assert history(killed) == history(reference)
    assert same(final_state(killed), final_state(reference))
    assert killed.read_summary()["metrics"]["eval/weight"] == reference.read_summary()["metrics"]["eval/weight"]
    rollouts = [{path.name: path.read_text() for path in run.rollouts.iterdir()} for run in (killed, reference)]
    assert rollouts[0] == rollouts[1]


def train_to_the_end(runs_dir: Path, backend: str, *arguments: str) -> RunDirectory:
    code, _, err = finish(
        spawn("train", "demo", "--runs-dir", str(runs_dir), "--name", "reference", "--backend", backend, *arguments)
    )
    assert code == 0, err
    return RunDirectory(runs_dir / "reference")


def test_a_run_killed_again_and_again_equals_the_undisturbed_one(tmp_path: Path) -> None:
    shape = ("--steps", "60", "--pause", "0.02", "--keep-checkpoints", "2")
    reference = train_to_the_end(tmp_path, "local", *shape)
    killed = RunDirectory(tmp_path / "killed")
    rng = random.Random(4)
    command = ("train", "demo", "--runs-dir", str(tmp_path), "--name", "killed", "--backend", "local", *shape)
    kills = 0
    for goal in (10, 25, 40):
        process = spawn(*command)
        await_steps(killed, goal, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        command = ("resume", "killed", "--runs-dir", str(tmp_path))
    assert kills == 3
    assert killed.read_summary()["status"] == "running", "nobody was left to say otherwise"
    code, _, err = finish(spawn(*command))
    assert code == 0, err
    assert_equal_runs(killed, reference)


@pytest.mark.ray
def test_on_ray_driver_and_actors_may_be_killed(tmp_path: Path) -> None:
    reference = train_to_the_end(tmp_path, "local", "--steps", "20")
    killed = RunDirectory(tmp_path / "killed")
    driver = spawn("train", "demo", "--runs-dir", str(tmp_path), "--name", "killed", "--steps", "20", "--pause", "0.1")
    await_steps(killed, 3, driver)
    actors_of(driver.pid)[0].kill()
    await_steps(killed, 8, driver)
    assert json.loads(killed.metrics.read_text().splitlines()[-1])["run/actor_restarts"] == 1

    family = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in family if process.name() in {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}]
    driver.kill()
    driver.communicate()
    resumed = spawn("resume", "killed", "--runs-dir", str(tmp_path))  # while the old cluster may still be falling apart
    assert len(agents) == 2
    assert len(family) >= 6
    assert all(is_gone(p) for p in family if p not in agents), "servers and actors end with their driver"
    assert all(map(is_gone, agents)), "Ray's agents end at the latest with the next start"
    code, _, err = finish(resumed)
    assert code == 0, err
    assert_equal_runs(killed, reference)


def actors_of(pid: int) -> list[psutil.Process]:
    return [
        process for process in psutil.Process(pid).children(recursive=True) if process.name().startswith("ray::Host")
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_says_so_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    directory = RunDirectory(tmp_path / "r")
    where = ("--runs-dir", str(tmp_path))
    process = spawn("train", "demo", *where, "--name", "r", "--backend", "local", "--steps", "500", "--pause", "0.01")
    await_steps(directory, 3, process)
    assert directory.is_live()
    code, _, err = finish(spawn("resume", "r", *where))
    assert code == 2
    assert f"is being written by process {process.pid}" in err
    process.send_signal(number)
    if number == signal.SIGHUP:
        process.send_signal(number)  # the shell of a terminal that closes sends its own
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    assert f"continue it with: longstride resume {directory.root}\n" in out
    summary = directory.read_summary()
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 3

    config = directory.read_config()
    directory.config.write_text(yaml.safe_dump({**config, "steps": summary["steps"] + 2}))
    code, out, err = finish(spawn("resume", str(directory.root)))
    assert (code, err) == (0, "")
    assert directory.read_summary()["wall_s"] > summary["wall_s"]
    assert [line["step"] for line in history(directory)] == list(range(1, summary["steps"] + 3))


def test_a_run_outlives_its_terminal_under_nohup_and_the_reader_of_its_output(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "r")
    shape = ("--backend", "local", "--steps", "60", "--pause", "0.01")
    process = spawn("train", "demo", "--runs-dir", str(tmp_path), "--name", "r", *shape, before=("nohup",))
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1/60")
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, directory.read_summary()["status"]) == (0, "finished"), err
    assert len(history(directory)) == 60


@pytest.mark.ray
def test_a_second_interrupt_ends_at_once_and_takes_ray_along(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "r")
    process = spawn("train", "demo", "--runs-dir", str(tmp_path), "--name", "r", "--steps", "500", "--pause", "0.05")
    await_steps(directory, 2, process)
    actors = actors_of(process.pid)
    assert len(actors) == 2
    for actor in actors:
        actor.suspend()  # so that the first interrupt finds something to wait for
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    code, _, _ = finish(process)
    assert code == 130
    assert all(map(is_gone, actors))


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the demo with a disk of 3 MiB mounted for it at <tmp_path>/disk; afterwards the disk is <tmp_path>/kept."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a disk")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()

    def run(before: str, *arguments: str) -> tuple[int, str, str]:
        script = f'mount -t tmpfs -o size=3m none {disk}; {before}; "$@"; code=$?; cp -a {disk} {kept}; exit $code'
        command = ["unshare", "-rm", "sh", "-c", script, "sh", *COMMAND, *arguments, "--runs-dir", str(disk / "runs")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoints(
    tmp_path: Path, small_disk: Callable[..., tuple[int, str, str]]
) -> None:
    shape = ("--backend", "local", "--width", "50000", "--keep-checkpoints", "100", "--steps", "100")
    code, _, err = small_disk("true", "train", "demo", "--name", "r", *shape)
    assert code == 2
    assert err.startswith("longstride: cannot ")
    assert "the disk is full: free some space" in err
    assert err.count("\n") == 1
    state = final_state(RunDirectory(tmp_path / "kept" / "runs" / "r"))
    assert state["step"] >= 1


def test_a_read_only_disk_is_refused(small_disk: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = small_disk(f"mount -o remount,ro {tmp_path / 'disk'}", "train", "demo", "--name", "r")
    assert code == 2
    assert err.startswith("longstride: cannot create the run directory")
    assert "read-only" in err
    assert err.count("\n") == 1
