import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.disk import refusals_explained, write_atomically
from launch.run_directory import RunDirectory, folder_to_fill
from models.errors import UserError


def test_a_fresh_run_has_every_folder(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "new" / "runs", "r", {"job": "demo", "steps": 3})
    assert {path.name for path in directory.root.iterdir()} == {"config.yaml", "tb", "checkpoints", "rollouts", "logs"}
    assert directory.read_config() == {"job": "demo", "steps": 3}


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="exists already: choose another --name"):
        RunDirectory.create(tmp_path, "r", {})
    assert list((tmp_path / "r").iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "latest", "-x", ".hidden"])
def test_names_that_are_no_folder_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        RunDirectory.create(tmp_path, name, {})


@pytest.mark.parametrize(
    ("file", "words"),
    [("config.yaml", "a run: continue it with `longstride resume {}/r`"), ("recipe.yaml", "the runs of several seeds"),
     ("sweep.yaml", "the trials of a sweep")],
)  # fmt: skip
def test_a_folder_holds_one_kind_of_thing(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / file).touch()
    for mark in {"", "recipe.yaml", "sweep.yaml"} - {file}:
        with pytest.raises(UserError, match=f"r exists already and holds {words.format(tmp_path)}.* another --name"):
            folder_to_fill(tmp_path, "r", mark)
    assert folder_to_fill(tmp_path, "r", file) == tmp_path / "r"


def test_a_run_is_found_by_name_by_path_and_as_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (RunDirectory.create(tmp_path, name, {"job": "demo"}) for name in ("one", "two"))
    one.point_latest()
    assert RunDirectory.open(tmp_path, "latest").root == one.root
    two.point_latest()
    assert RunDirectory.open(tmp_path, "latest").root == two.root
    assert RunDirectory.open(Path("nowhere"), str(one.root)).root == one.root
    assert [directory.name for directory in RunDirectory.all(tmp_path)] == ["one", "two"]
    assert RunDirectory.create(tmp_path / "many", "seed-0", {"job": "demo"}).root == tmp_path / "many" / "seed-0"
    RunDirectory(tmp_path / "many" / "seed-0").point_latest()
    RunDirectory.create(tmp_path / "tried" / "trials", "0a1b", {"job": "demo"})
    found = [str(directory.root.relative_to(tmp_path)) for directory in RunDirectory.all(tmp_path)]
    assert found == ["one", "two", "many/seed-0", "tried/trials/0a1b"]
    assert all(RunDirectory.open(tmp_path, name).root == tmp_path / name for name in found)
    (tmp_path / "many" / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"many holds the runs of several seeds: .* `longstride runs` names each"):
        RunDirectory.open(tmp_path, "many")
    with pytest.raises(UserError, match="did you mean one"):
        RunDirectory.open(tmp_path, "oen")


HOLDER = """
import sys
from pathlib import Path
from launch.run_directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_has_one_writer_until_that_is_gone(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "r", {"job": "demo"})
    assert not directory.is_live()
    command = [sys.executable, "-c", HOLDER, str(directory.root)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert directory.is_live()
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        directory.lock()
    holder.kill()
    holder.wait()
    assert not directory.is_live()
    directory.lock()
    directory.unlock()


def test_whether_a_run_is_live_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(tmp_path, "r", {"job": "demo"})
    directory.lock()
    directory.unlock()
    really = Path.open

    def read_only(path: Path, mode: str = "r", *rest: Any) -> Any:  # chmod would not stop root
        if set(mode) & set("wa+"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path, mode, *rest)

    monkeypatch.setattr(Path, "open", read_only)
    assert not directory.is_live()


def test_a_full_disk_is_explained() -> None:
    device, message = Path("/dev/full"), r"cannot write /dev/full: the disk is full.*--runs-dir"
    with pytest.raises(UserError, match=message), refusals_explained(device, "write"):
        device.write_text("x")


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EDQUOT, "quota")]
)
def test_other_refusals_are_explained(code: int, words: str) -> None:
    with pytest.raises(UserError, match=f"cannot write here: .*{words}"), refusals_explained(Path("here"), "write"):
        raise OSError(code, os.strerror(code))


def test_what_the_user_cannot_mend_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="broken") as caught, refusals_explained(Path("here"), "write"):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, UserError)


def test_a_path_below_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        RunDirectory.create(tmp_path / "file" / "runs", "r", {})


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udc80")
    assert path.read_text() == "old"


def test_runs_that_were_discarded_leave_no_latest(tmp_path: Path) -> None:
    """Two at once, in either order."""
    for order in (1, -1):
        both = [RunDirectory.create(tmp_path, name, {"job": "demo"}) for name in ("a", "b")]
        for directory in both:
            directory.point_latest()
        for directory in both[::order]:
            directory.discard()
        assert not list(tmp_path.iterdir())
