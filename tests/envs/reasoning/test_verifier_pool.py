import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil  # noqa: F401 - for the script of a process of its own
import pytest

from envs.reasoning.evaluated_answers import EVALUATED
from envs.reasoning.problem import Problem
from envs.reasoning.sources import load_problems
from envs.reasoning.verifier_pool import VerifierPool
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "tests.envs.reasoning.hostile_checks"


def hostile_pool(workers: int = 1, timeout_s: float = 1.0, **options) -> VerifierPool:
    return VerifierPool(workers, timeout_s, modules=[HOSTILE], **options)


def hostile_problems(count: int) -> list[Problem]:
    return [Problem(id=f"hostile#{index}", prompt="", answer="yes", verifier="hostile") for index in range(count)]


def reasons(pool: VerifierPool, completions: list[str]) -> list[str]:
    return [verdict.reason for verdict in pool.score(hostile_problems(len(completions)), completions)]


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("sleep 600", "timeout"),
        ("spin", "timeout"),
        ("exit 0", "crash"),
        ("exit 3", "crash"),
        ("segfault", "crash"),
        ("raise no", "crash"),
        ("eat 4000", "crash"),
        ("nan", "crash"),
    ],
)
def test_a_misbehaving_verifier_costs_its_own_item_only(deed: str, reason: str) -> None:
    completions = ["print yes", "no", deed, "yes", "print no", "yes"]
    with hostile_pool() as pool:
        verdicts = pool.score(hostile_problems(6), completions)
        assert [verdict.reason for verdict in verdicts] == ["correct", "wrong", reason, "correct", "wrong", "correct"]
        assert [verdict.reward for verdict in verdicts] == [1, 0, 0, 1, 0, 1]
        assert pool.counts == {"correct": 3, "wrong": 2, reason: 1}
        assert reasons(pool, ["yes"]) == ["correct"]  # and the pool is in order afterwards


def test_nothing_is_lost_and_nothing_changes_place_in_a_mixed_batch() -> None:
    fates = {"yes": "correct", "no": "wrong", "exit 1": "crash", "sleep 600": "timeout", "x" * 2000: "too_long"}
    completions = random.Random(0).choices(list(fates), weights=[60, 60, 3, 2, 5], k=120)
    assert set(completions) == set(fates)
    with hostile_pool(workers=2, timeout_s=1.0, max_characters=1000) as pool:
        assert reasons(pool, completions) == [fates[completion] for completion in completions]
        assert pool.counts == Counter(fates[completion] for completion in completions)


def test_a_batch_whose_every_item_fails() -> None:
    with hostile_pool(workers=2, timeout_s=1.0) as pool:
        assert reasons(pool, ["exit 1", "sleep 9", "segfault"] * 3) == ["crash", "timeout", "crash"] * 3


def test_ten_megabytes_of_garbage() -> None:
    problems = [
        *load_problems("gym:chain_sum", 2, seed=0),
        *(Problem(f"#{name}", "", "1", verifier=name) for name in ("math", "exact")),
    ]
    garbage = random.Random(0).randbytes(5_000_000).decode("latin-1") + "\\boxed{" * 700_000
    with VerifierPool(1, timeout_s=10) as pool:
        mixed = pool.score(problems, [garbage, problems[1].answer, garbage, "1"])
        assert [verdict.reason for verdict in mixed] == ["too_long", "correct", "too_long", "correct"]
    with VerifierPool(1, timeout_s=20, max_characters=20_000_000) as pool:  # and if it is let through
        verdicts = pool.score(problems, [garbage, problems[1].answer, garbage, garbage])
        assert [verdict.correct for verdict in verdicts] == [False, True, False, False]


def test_no_completions() -> None:
    with VerifierPool(1) as pool:
        assert pool.score([], []) == []


@pytest.mark.parametrize(
    ("deed", "reason"), [("offspring", "timeout"), ("leave", "timeout"), ("daemon", "wrong")], ids=str
)
def test_a_verifier_takes_its_offspring_along(deed: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(note := tmp_path / "pids")
    with open(os.open(note, os.O_RDONLY | os.O_NONBLOCK)) as pipe, hostile_pool(timeout_s=3) as pool:
        # an ordinary user's check cannot even start a process
        assert reasons(pool, [f"{deed} {note}"])[0] in {reason, "crash"}
        pids = pipe.read().split()
        assert pids or os.getuid()
        for pid in map(int, pids):
            assert_ends(pid)
        assert reasons(pool, ["yes"]) == ["correct"]


def test_what_a_completion_does_to_the_interpreter_no_other_item_sees() -> None:
    with hostile_pool() as pool:
        assert reasons(pool, ["bribe yes", "no", "bribe no", "no"]) == ["correct", "wrong", "wrong", "wrong"]
        assert reasons(pool, ["no"]) == ["wrong"]


def test_a_check_writes_to_no_file_and_has_no_home(tmp_path: Path) -> None:
    with hostile_pool() as pool:
        assert reasons(pool, [f"write {tmp_path / 'yes'}", "home", "yes"]) == ["crash", "homeless", "correct"]
    assert not (tmp_path / "yes").exists() or (tmp_path / "yes").stat().st_size == 0


def test_what_a_check_says_of_a_completion_is_not_shown() -> None:
    reading, writing = os.pipe()  # a fork cannot write to the file that pytest puts in the place of the terminal
    ours = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        with hostile_pool() as pool:
            assert reasons(pool, ["complain yes", "print yes", "segfault"]) == ["correct", "correct", "crash"]
    finally:
        os.dup2(ours, 2)
        os.close(ours)
    with open(reading) as shown:
        assert shown.read() == ""


@pytest.mark.parametrize("text", ["no", "[]", "7", '{"reward": 2, "reason": "yes"}', '{"ready": true}'])
def test_what_is_no_verdict_is_a_crash(text: str) -> None:
    with hostile_pool() as pool:
        assert reasons(pool, [f"gibberish {text}", "yes"]) == ["crash", "correct"]


FORGERY = (
    "exec(\"import envs.reasoning.verify as v; v.CHECKS.update(gym=lambda p, c: v.Verdict(1.0, 'correct'));"
    ' v.gym_dataset.score = lambda a, p: 1.0")'
)


@pytest.mark.parametrize("family", sorted(EVALUATED))
def test_an_answer_that_a_scorer_evaluates_runs_no_code(family: str, tmp_path: Path) -> None:
    problems = load_problems(f"gym:{family}", 3, seed=0)
    touch = f"__import__('pathlib').Path({str(tmp_path / 'touched')!r}).touch()"
    with VerifierPool(1, timeout_s=20) as pool:
        verdicts = pool.score(problems, [f"\\boxed{{{FORGERY}}}", f"\\boxed{{{touch}}}", "nothing"])
        again = pool.score(problems, [*[problem.answer for problem in problems[:2]], "nothing"])
    assert not (tmp_path / "touched").exists()
    assert max(verdict.reward for verdict in verdicts) < 0.1
    assert [verdict.correct for verdict in again] == [True, True, False]


@pytest.mark.parametrize("deed", ["yes", "spin", "sleep 600"])
def test_workers_end_with_the_process_of_the_pool_even_if_it_is_killed(deed: str) -> None:
    script = (
        "from tests.envs.reasoning.test_verifier_pool import *\n"  # no __main__ guard
        "pool = hostile_pool(timeout_s=600)\n"
        "pool.score(hostile_problems(1), ['yes'])\n"
        "worker = pool._workers[0]._process.pid\n"
        "def tell():\n"
        "    time.sleep(1)\n"
        "    print(worker, *(child.pid for child in psutil.Process(worker).children()), flush=True)\n"
        "threading.Thread(target=tell).start()\n"
        f"pool.score(hostile_problems(1), [{deed!r}])\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == (1 if deed == "yes" else 2)  # the worker, and the fork that judges
        for pid in pids:
            os.kill(pid, 0)  # alive
        process.send_signal(signal.SIGKILL)
    for pid in pids:
        assert_ends(pid)


def test_score_is_safe_from_several_threads() -> None:
    results: dict[int, list[str]] = {}
    with hostile_pool(workers=2) as pool:
        threads = [
            threading.Thread(target=lambda n=n: results.update({n: reasons(pool, ["yes", "no", "exit 1"][n:])}))
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {0: ["correct", "wrong", "crash"], 1: ["wrong", "crash"], 2: ["crash"]}


def test_workers_that_cannot_start_are_an_error_not_a_hang() -> None:
    with VerifierPool(1, modules=["no_such_module"]) as pool, pytest.raises(UserError, match="do not start"):
        pool.score(hostile_problems(1), ["yes"])
    with VerifierPool(1) as pool, pytest.raises(UserError, match="do not start"):  # nobody registered `hostile`
        pool.score(hostile_problems(1), ["yes"])
    with VerifierPool(1, memory_limit_mib=60) as pool, pytest.raises(UserError, match="memory limit"):
        pool.score(load_problems("gym:chain_sum", 1, seed=0), ["1"])


def test_workers_see_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with hostile_pool() as pool:
        reasons(pool, ["yes"])
        environment = Path(f"/proc/{pool._workers[0]._process.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment


def assert_ends(pid: int) -> None:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # its parent, which is gone too, has not collected it yet
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} lives on")
