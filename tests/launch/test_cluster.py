import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from launch import cluster
from models.errors import UserError


@pytest.mark.parametrize("address", ["nonsense", ":6379", "ray://head:10001", "head:port"])
def test_an_address_of_the_wrong_form_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="write host:port, or auto"):
        cluster._join(address, {})


def test_an_address_where_nobody_answers_is_refused_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else listens there either
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--ray-address {address}: no Ray cluster answers there .*refused"):
            cluster._join(address, {})


def test_session_folders_leave_room_for_the_names_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/a/rather/long/path/to/temporary/files/of/someone")
    socket_name = cluster._session_folder() / "session_2026-01-01_00-00-00_000000_1234567" / "sockets" / "plasma_store"
    assert len(str(socket_name)) <= 107


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls of ray.init, which all fail as Ray does where its agents come up too late, and leave a process behind."""
    calls: list[dict[str, object]] = []

    def init(**settings: object) -> None:
        calls.append(settings)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        raise Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed"
        )

    monkeypatch.setattr("ray.init", init)
    return calls


def test_a_start_without_processor_time_is_tried_again_and_then_refused(starts: list, tmp_path: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(UserError, match=r"Ray did not start, 3 times in a row.* or add --backend local"):
        cluster._start_own(tmp_path, {}, tmp_path / "ray.log")
    assert len(starts) == 3
    assert psutil.Process().children() == before, "nothing of the tries is left"
    assert "start 3 of 3: The current node timed out" in (tmp_path / "ray.log").read_text()


def test_other_failures_of_rays_start_are_raised_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**settings: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(OSError, match="no space left"):
        cluster._start_own(tmp_path, {}, tmp_path / "ray.log")


def test_a_signal_to_the_process_group_leaves_the_cluster_alone() -> None:
    driver = """
        import os, signal, time, ray
        from launch import cluster

        cluster.start()
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.killpg(0, signal.SIGTERM)  # as `timeout` does
        time.sleep(0.5)
        print("answer:", ray.get(ray.remote(lambda: 1).remote(), timeout=30))
        cluster.stop()
    """
    command = [sys.executable, "-c", textwrap.dedent(driver)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert ended.returncode == 0, ended.stderr
    assert "answer: 1" in ended.stdout
