"""What a dead actor's log is read for."""

from pathlib import Path

from launch import autopsy
from launch.autopsy import BirthRecord, cause_of_death, last_lines


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "rollout-0.log"
    log.write_text("of an earlier life\n")
    birth = BirthRecord.now(log)
    with log.open("a") as file:
        file.write("a line of a chatty actor\n" * 100_000)
        file.write("Fatal Python error: Segmentation fault\n")
    assert len(birth.written()) <= autopsy.READ_BYTES
    assert cause_of_death(birth, "") == "crashed: Segmentation fault"
    assert len(last_lines(birth).splitlines()) == 1 + autopsy.TAIL


def test_a_short_log_is_read_from_the_birth_on(tmp_path: Path) -> None:
    log = tmp_path / "rollout-0.log"
    log.write_text("of an earlier life\n")
    birth = BirthRecord.now(log)
    log.open("a").write("mine\n")
    assert birth.written() == "mine\n"
