"""Asking rollout workers that die or take too long."""

from concurrent.futures import Future
from typing import Any

import pytest

from launch.cli import main
from launch.local_group import LocalGroup
from launch.run import ActorDied, CallTimedOut
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.rollout import ATTEMPTS, TIMEOUTS, collect
from models.errors import UserError
from tests.llm_rl.test_reason import SMALL

DEATH, DELAY = ActorDied("rollout-1 died during rollout: out of memory"), CallTimedOut("rollout ran past its limit")


class Workers:
    """Two of them; the second one loses its first calls in these ways."""

    def __init__(self, *losses: Exception) -> None:
        self.losses, self.calls = list(losses), 0

    def __len__(self) -> int:
        return 2

    def call(self, index: int, method: str, prompts: list[list[int]], *_: Any, timeout_s: float) -> "Future[Any]":
        future: Future[Any] = Future()
        self.calls += index
        if index == 1 and self.losses:
            future.set_exception(self.losses.pop(0))
        else:
            future.set_result([[Completion(prompt, [0.0], "stop", 0)] for prompt in prompts])
        return future


def ask(workers: Workers) -> list[list[int]]:
    prompts = [[number] for number in range(5)]
    rows = collect(workers, prompts, SamplingConfig(), 1, 0, timeout_s=7)  # type: ignore[arg-type]
    return [row[0].tokens for row in rows]


@pytest.mark.parametrize("losses", [[DEATH] * (ATTEMPTS - 1), [DELAY], [DEATH, DELAY, DEATH]])
def test_a_lost_share_is_asked_again(losses: list[Exception]) -> None:
    assert ask(Workers(*losses)) == [[number] for number in range(5)]


def test_a_share_that_is_too_long_is_asked_twice() -> None:
    workers = Workers(*[DELAY] * 9)
    with pytest.raises(UserError, match=r"--rollout.timeout-s 7, 2 times.*rollout ran past its limit"):
        ask(workers)
    assert workers.calls == TIMEOUTS


def test_the_last_death_is_told() -> None:
    workers = Workers(*[DEATH] * 9)
    with pytest.raises(UserError, match=r"died 5 times in a row.*out of memory"):
        ask(workers)
    assert workers.calls == ATTEMPTS


@pytest.mark.parametrize(
    ("method", "flag"), [("sft_step", "--learner"), ("weights", "--learner"), ("rollout", "--rollout")]
)
def test_a_time_limit_ends_in_one_line(
    method: str, flag: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = LocalGroup.call

    def call(self: LocalGroup, index: int, name: str, *args: Any, **settings: Any) -> "Future[Any]":
        if name != method:
            return plain(self, index, name, *args, **settings)
        future: Future[Any] = Future()
        future.set_exception(CallTimedOut(f"{name} ran past its limit"))
        return future

    monkeypatch.setattr(LocalGroup, "call", call)
    assert main(["train", "reason", *SMALL, "--runs-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert f"{flag}.timeout-s" in error
    assert f"{method} ran past its limit" in error
    (run,) = (folder for folder in tmp_path.iterdir() if folder.name != "latest")
    assert (run / "logs").is_dir()  # even if it ended in its first evaluation
