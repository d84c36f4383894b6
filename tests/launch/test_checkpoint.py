import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.checkpoint import Checkpoint, CheckpointStore, read
from models.errors import UserError


def state_of(step: int) -> dict:
    return {"step": step, "weights": torch.full((300, 100), float(step)), "buffer": np.full(1000, step)}


def steps_on_disk(store: CheckpointStore) -> list[int]:
    return sorted(read(path).step for path in store.root.glob("step-*"))


def newest(store: CheckpointStore) -> Checkpoint:
    checkpoint = store.newest()
    assert checkpoint is not None
    return checkpoint


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, warn=[].append)


def test_a_fresh_store_has_no_checkpoint(store: CheckpointStore) -> None:
    assert store.newest() is None


def test_state_comes_back_exactly(store: CheckpointStore) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    state = {
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "long": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(0.1),
        "transposed": weight.T,
        "slice": weight[1],
        "tied": [weight, weight],
        "empty": [torch.empty(0), torch.empty(0, 3)],
        "array": np.float64([[0.1, np.inf], [np.nan, -0.0]]),
        "zero_d": np.array(3, dtype=np.uint8),
        "by_number": {0: {"exp_avg": torch.ones(2)}, 10: 1.5, -1: None},
        "mixed_keys": {"a": 1, 2: "b"},
        "rng": {"state": 2**127 + 1, "has_uint32": False},
        "betas": (0.9, 0.999),
        "numpy_number": np.float32(0.5),
        "names": ["ä", "", "line\nbreak"],
        "nothing": None,
        "$tensor": "a key that looks like ours",
    }
    store.save(3, state, score=None, wall_s=1.0)
    back = newest(store).load()

    assert list(back) == list(state)
    for name in ("bf16", "long", "mask", "scalar", "transposed", "slice"):
        assert back[name].dtype == state[name].dtype
        assert torch.equal(back[name], state[name])
    assert back["tied"][0] is back["tied"][1]
    assert [tuple(t.shape) for t in back["empty"]] == [(0,), (0, 3)]
    assert isinstance(back["array"], np.ndarray)
    assert back["array"].tobytes() == state["array"].tobytes()
    assert (back["zero_d"].shape, back["zero_d"].dtype) == ((), np.uint8)
    assert list(back["by_number"]) == [0, 10, -1]
    assert torch.equal(back["by_number"][0]["exp_avg"], torch.ones(2))
    assert back["mixed_keys"] == {"a": 1, 2: "b"}
    assert back["rng"] == state["rng"]
    assert back["betas"] == (0.9, 0.999)
    assert back["numpy_number"] == 0.5
    assert back["names"] == state["names"]
    assert back["$tensor"] == state["$tensor"]


def test_optimizer_continues_as_if_never_stored(store: CheckpointStore) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    store.save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, None, 0.0)
    step(model, optimizer)

    back = newest(store).load()
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(back["model"])
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    resumed.load_state_dict(back["optimizer"])
    step(other, resumed)
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [1, object()]}}, r"state\.a\.b\[1\] is a object"),
        ({"a": {1, 2}}, r"state\.a is a set"),
        ({"a": np.array(["x"])}, r"state\.a is an array of <U1"),
        ({"a": {(1, 2): 3}}, r"state\.a has a key of type tuple"),
    ],
)
def test_what_would_need_pickling_is_refused_by_path(store: CheckpointStore, state: dict, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        store.save(1, state, None, 0.0)
    assert list(store.root.parent.rglob("step-*")) == []


def test_the_last_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        store.save(step, state_of(step), score, wall_s=float(step))
    assert steps_on_disk(store) == [2, 4, 5]
    store.save(6, state_of(6), 0.9, 6.0)  # as good as the best so far, and newer
    assert steps_on_disk(store) == [5, 6]
    assert newest(store).wall_s == 6.0


def test_a_step_saved_again_wins_over_its_first_attempt(store: CheckpointStore) -> None:
    store.save(4, {"attempt": 1}, None, 0.0)
    store.save(4, {"attempt": 2}, None, 0.0)
    assert newest(store).load() == {"attempt": 2}


def damage(path: Path, how: str) -> None:
    match how:
        case "truncated":
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
        case "flipped":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        case "missing":
            path.unlink()


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("tensors.safetensors", "truncated"),
        ("tensors.safetensors", "flipped"),
        ("arrays.safetensors", "flipped"),
        ("arrays.safetensors", "missing"),
        ("state.json", "flipped"),
        ("state.json", "missing"),
        ("manifest.json", "truncated"),
        ("manifest.json", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, file: str, how: str) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, keep=3, warn=warnings.append)
    for step in (1, 2):
        store.save(step, state_of(step), None, 0.0)
    damage(tmp_path / "step-00000002" / file, how)

    assert newest(store).step == 1
    assert len(warnings) == 1
    assert re.search(f"step-00000002.*{file}", warnings[0])
    store.save(2, state_of(2), None, 0.0)  # the run goes on and gets there again
    assert newest(store).load()["step"] == 2


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"format": 2, "score": null, "wall_s": 1, "metric_lines": 2, "files": []}',
        '{"format": 2, "score": null, "wall_s": 1, "metric_lines": 2, "files": {"state.json": 3}}',
    ],
)
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, manifest: str) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, keep=1, warn=warnings.append)
    store.save(1, state_of(1), None, 0.0)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "manifest.json").write_text(manifest)
    assert newest(store).step == 1
    assert re.search(r"step-00000002.*manifest.json is damaged", warnings[0])
    store.save(3, state_of(3), None, 0.0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses to write more than `size` bytes to any one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_write_names_place_and_mend_and_spares_the_rest(store: CheckpointStore) -> None:
    store.save(1, state_of(1), None, 0.0)
    with largest_file(50_000), pytest.raises(UserError, match=r"step 2 in .*checkpoints: .*--runs-dir"):
        store.save(2, state_of(2), None, 0.0)
    assert [path.name for path in store.root.iterdir()] == ["step-00000001"]
    assert newest(store).load()["step"] == 1


WRITER = """
import sys
from pathlib import Path
from launch.checkpoint import CheckpointStore
from tests.launch.test_checkpoint import state_of
store = CheckpointStore(Path(sys.argv[1]), keep=2)
newest = store.newest()
step = newest.step if newest else 0
print("ready", flush=True)
while True:
    step += 1
    store.save(step, state_of(step), float(step % 7), 0.0)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(1)
    promised = 0
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(writer.pid, signal.SIGKILL)
        said = writer.stdout.read().splitlines()
        writer.wait()
        promised = max([promised, *map(int, filter(str.isdigit, said))])

        warnings: list[str] = []
        checkpoint = CheckpointStore(tmp_path, keep=2, warn=warnings.append).newest()
        assert warnings == []
        if promised == 0:
            continue
        assert checkpoint is not None
        assert checkpoint.step >= promised
        state = checkpoint.load()
        assert state["step"] == checkpoint.step
        assert torch.equal(state["weights"], state_of(checkpoint.step)["weights"])
        assert np.array_equal(state["buffer"], state_of(checkpoint.step)["buffer"])
    assert promised > 5

    store = CheckpointStore(tmp_path, keep=1)
    store.save(promised + 100, state_of(0), None, 0.0)
    assert not list(tmp_path.glob(".*")), "what killed writers left behind is swept away"


def test_no_file_of_a_checkpoint_is_a_pickle(store: CheckpointStore) -> None:
    store.save(1, state_of(1), 0.5, 2.0)
    path = newest(store).path
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    for file in path.glob("*.json"):
        json.loads(file.read_text())
