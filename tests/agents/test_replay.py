from pathlib import Path

import numpy as np
import pytest
import torch

from agents.replay import ReplayBuffer, ReplayFiles
from models.errors import UserError

WIDTH = 2 * 3 + 2 + 2  # of 3 numbers an observation, 2 an action


def buffer(capacity: int = 10, observation_size: int = 3) -> ReplayBuffer:
    return ReplayBuffer(capacity, observation_size, 2)


def rows(begin: int, end: int, width: int = WIDTH) -> np.ndarray:
    """Row i of a run holds 100 i, 100 i + 1, ..."""
    return (100 * np.arange(begin, end)[:, None] + np.arange(width)).astype(np.float32)


def contents(replay: ReplayBuffer) -> np.ndarray:
    return replay.rows_CW[: len(replay)].numpy()


def test_a_batch_is_the_columns_of_its_rows() -> None:
    replay = buffer()
    replay.add(rows(0, 4))
    batch = replay.take(torch.tensor([3, 0]))
    assert batch.observations_BD.tolist() == [[300, 301, 302], [0, 1, 2]]
    assert batch.actions_BA.tolist() == [[303, 304], [3, 4]]
    assert batch.observations_actions_BX.tolist() == [[300, 301, 302, 303, 304], [0, 1, 2, 3, 4]]
    assert batch.rewards_B.tolist() == [305, 5]
    assert batch.discounts_B.tolist() == [306, 6]
    assert batch.next_observations_BD.tolist() == [[307, 308, 309], [7, 8, 9]]


@pytest.mark.parametrize("sizes", [[3] * 9, [7, 7, 13], [25, 2], [10, 10]])
def test_the_latest_transitions_are_kept(sizes: list[int]) -> None:
    replay, begin = buffer(10), 0
    for size in sizes:
        replay.add(rows(begin, begin + size))
        begin += size
        kept = rows(max(0, begin - 10), begin)
        assert sorted(contents(replay)[:, 0]) == kept[:, 0].tolist()
        np.testing.assert_array_equal(replay.between(max(0, begin - 10), begin), kept)
    assert replay.added == begin


def test_sampling_is_uniform_over_what_is_there_and_repeats_with_the_seed() -> None:
    replay = buffer(10)
    replay.add(rows(0, 8))
    draws = [replay.take(replay.draw(1, 8000, torch.Generator().manual_seed(seed))[0]).rewards_B for seed in (1, 1, 2)]
    counts = torch.bincount(((draws[0] - 5) / 100).long())
    assert len(counts) == 8
    assert counts.min() > 900
    assert counts.max() < 1100
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("capacity", [100, 30, 5])
def test_a_restored_buffer_is_the_saved_one(tmp_path: Path, capacity: int) -> None:
    """At each save of a run, whatever the capacity: more than the run, a few saves, less than between two saves."""
    replay, files = buffer(capacity), ReplayFiles(tmp_path / "replay")
    for i in range(8):
        replay.add(rows(10 * i, 10 * i + 10))
        state = files.save(replay)
        again = buffer(capacity)
        ReplayFiles(tmp_path / "replay").restore(again, state)
        assert again.added == replay.added
        np.testing.assert_array_equal(contents(again), contents(replay))


def test_a_save_writes_only_what_is_new(tmp_path: Path) -> None:
    replay, files = buffer(100), ReplayFiles(tmp_path / "replay")
    replay.add(rows(0, 60))
    files.save(replay)
    (first,) = (tmp_path / "replay").iterdir()
    before = first.stat()
    replay.add(rows(60, 65))
    files.save(replay)
    second = max((tmp_path / "replay").iterdir())
    assert first.stat() == before
    assert second.stat().st_size < before.st_size / 3
    files.save(replay)  # nothing new
    assert len(list((tmp_path / "replay").iterdir())) == 2


def test_files_that_no_recent_checkpoint_needs_are_removed(tmp_path: Path) -> None:
    replay, files = buffer(20), ReplayFiles(tmp_path / "replay")
    for i in range(30):
        replay.add(rows(10 * i, 10 * i + 10))
        files.save(replay)
    assert len(list((tmp_path / "replay").iterdir())) == 9 + 2  # ten saves back, and the 20 rows before that


def test_what_was_written_after_the_checkpoint_is_written_anew(tmp_path: Path) -> None:
    """A run killed after a save of the buffer and before its checkpoint goes on from the checkpoint before."""
    replay, files = buffer(100), ReplayFiles(tmp_path / "replay")
    replay.add(rows(0, 10))
    state = files.save(replay)
    replay.add(rows(10, 20))
    files.save(replay)
    (tmp_path / "replay" / ".rows-000000000020-000000000030.safetensors").write_bytes(b"half of a fi")

    resumed, files = buffer(100), ReplayFiles(tmp_path / "replay")
    files.restore(resumed, state)
    assert len(list((tmp_path / "replay").iterdir())) == 1
    resumed.add(rows(1010, 1025))
    state = files.save(resumed)
    again = buffer(100)
    ReplayFiles(tmp_path / "replay").restore(again, state)
    np.testing.assert_array_equal(contents(again), np.concatenate([rows(0, 10), rows(1010, 1025)]))


def test_damage_is_named(tmp_path: Path) -> None:
    replay, files = buffer(100), ReplayFiles(tmp_path / "replay")
    replay.add(rows(0, 10))
    state = files.save(replay)
    with pytest.raises(UserError, match="another environment: its rows have 10 numbers instead of 12"):
        ReplayFiles(tmp_path / "replay").restore(buffer(observation_size=4), state)
    (path,) = (tmp_path / "replay").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        ReplayFiles(tmp_path / "replay").restore(buffer(), state)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        ReplayFiles(tmp_path / "replay").restore(buffer(), state)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "replay").write_text("a file where the folder should be")
    replay = buffer()
    replay.add(rows(0, 3))
    with pytest.raises(UserError, match="cannot save the replay buffer in"):
        ReplayFiles(tmp_path / "replay").save(replay)
