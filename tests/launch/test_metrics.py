import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.checkpoint import Checkpoint
from launch.metrics import MetricsFiles
from launch.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "r", {"job": "demo"})


def lines(directory: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def scalars(directory: RunDirectory, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_step_is_in_both_files_as_soon_as_it_is_written(directory: RunDirectory) -> None:
    files = MetricsFiles(directory, None)
    files.write(1, {"train/loss": 0.5, "time/step_s": 2.0})
    (line,) = lines(directory)
    assert (line["step"], line["train/loss"], line["time/step_s"]) == (1, 0.5, 2.0)
    assert scalars(directory, "train/loss") == [(1, 0.5)]
    files.close()


def test_a_resumed_run_records_no_step_twice(directory: RunDirectory) -> None:
    first = MetricsFiles(directory, None)
    for step in range(1, 4):
        first.write(step, {"x": step})
    checkpoint = Checkpoint(Path(), 3, 0, None, 0.0, first.lines, {})
    first.write(3, {"late": 3})  # of the checkpoint's own step, but after it
    for step in range(4, 6):
        first.write(step, {"x": step})
    first.close()
    with directory.metrics.open("a") as file:
        file.write('{"step": 6, "x"')  # a crash in the middle of a line

    second = MetricsFiles(directory, checkpoint)
    assert [line["step"] for line in lines(directory)] == [1, 2, 3]
    for step in range(4, 7):
        second.write(step, {"x": 10 * step})
    second.close()
    assert [(line["step"], line["x"]) for line in lines(directory)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
        (5, 50),
        (6, 60),
    ]
    assert scalars(directory, "x") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_run_without_a_checkpoint_begins_anew(directory: RunDirectory) -> None:
    first = MetricsFiles(directory, None)
    first.write(0, {"x": 0})
    first.write(1, {"x": 1})
    first.close()
    MetricsFiles(directory, None).close()
    assert lines(directory) == []
