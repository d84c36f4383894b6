"""Scores completions in child processes that can be killed, so that no completion can hang or crash the run.

A verifier that hangs, crashes or runs out of memory costs its own item a reward of 0, with a reason that is counted;
the other items are scored as if it had not been there. The children are started by exec, not by fork, and speak JSON:
the pool is safe in a process with threads and CUDA, in a Ray actor, and in a script without a `__main__` guard.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.verifier_worker import HEADER, frame
from models.errors import UserError

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]  # the folder that `envs` is imported from
_BATCH = 32  # items to a message: the trip to the worker costs little beside them
_START_TIMEOUT_S = 120.0  # imports on a busy machine
_MAX_FAILED_STARTS = 3
_LOGGED_FAILURES = 10
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH")


class VerifierPool:
    """`workers` processes that score completions.

    timeout_s: wall-clock seconds that one completion may take.
    memory_limit_mib: address space of one worker.
    max_characters: a longer completion is `too_long`, and no verifier sees it.
    modules: imported by the workers before anything else; they may `envs.reasoning.verify.register` checks.
    counts: verdicts so far, by reason.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_s: float = 5.0,
        memory_limit_mib: int = 2048,
        max_characters: int = 1_000_000,
        modules: Sequence[str] = (),
    ) -> None:
        if workers < 1 or timeout_s <= 0:
            raise UserError(f"a verifier pool of {workers} workers with {timeout_s} s an item: both must be positive")
        self.counts: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._max_characters = max_characters
        self._arguments = [str(memory_limit_mib), *modules]
        self._workers = [_Worker(self._arguments) for _ in range(workers)]
        self._failed_starts = 0
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Score each completion of the problem at the same position.

        Raises UserError if the workers cannot be started at all (their own message is in the log).
        """
        with self._lock:
            verdicts = self._score(list(zip(problems, completions, strict=True)))
            self.counts.update(verdict.reason for verdict in verdicts)
        return verdicts

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _score(self, items: "list[tuple[Problem, str]]") -> list[Verdict]:
        if not self._workers:
            raise RuntimeError("the verifier pool is closed")
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting: deque[int] = deque()
        for index, (_, completion) in enumerate(items):
            if len(completion) > self._max_characters:
                verdicts[index] = Verdict(0.0, "too_long")
            else:
                waiting.append(index)
        batch_size = max(1, min(_BATCH, len(waiting) // (2 * len(self._workers))))
        while waiting or any(worker.batch for worker in self._workers):
            for worker in self._workers:
                if waiting and not worker.batch:
                    batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                    worker.send(batch, [_message(*items[index]) for index in batch])
            for worker in self._wait():
                for reply in worker.receive():
                    self._failed_starts = 0
                    if "ready" not in reply:
                        index = worker.batch.popleft()
                        if "error" in reply:
                            verdicts[index] = Verdict(0.0, "crash")
                            self._report(items[index][0], "crash", reply["error"])
                        else:
                            verdicts[index] = Verdict(reply["reward"], reply["reason"])
                    worker.deadline = time.monotonic() + self._timeout_s
            for position, worker in enumerate(self._workers):
                cause = worker.cause_of_failure()
                if cause is None:
                    continue
                worker.kill()
                if worker.ready:
                    index = worker.batch.popleft()
                    verdicts[index] = Verdict(0.0, cause)
                    self._report(items[index][0], cause, worker.ending())
                else:
                    self._count_failed_start(worker)
                waiting.extendleft(reversed(worker.batch))
                self._workers[position] = _Worker(self._arguments)
        return [verdict for verdict in verdicts if verdict is not None]

    def _wait(self) -> "list[_Worker]":
        """Wait until a worker can be written to or read from, or one is out of time; return the readable ones."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if worker.batch:
                    writes = selectors.EVENT_WRITE if worker.outgoing else 0
                    selector.register(worker.channel, selectors.EVENT_READ | writes, worker)
            first_deadline = min(worker.deadline for worker in self._workers if worker.batch)
            events = selector.select(max(0.0, first_deadline - time.monotonic()))
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
        return [key.data for key, mask in events if mask & selectors.EVENT_READ]

    def _report(self, problem: Problem, cause: str, detail: str) -> None:
        """Log the first few failures of each kind; a policy that provokes them would fill the disk. All are counted."""
        self._failures[cause] += 1
        if self._failures[cause] <= _LOGGED_FAILURES:
            log.warning("the verifier `%s` of %s: %s (%s)", problem.verifier, problem.id, cause, detail)

    def _count_failed_start(self, worker: "_Worker") -> None:
        self._failed_starts += 1
        if self._failed_starts == _MAX_FAILED_STARTS:
            self.close()
            raise UserError(
                f"verifier workers do not start ({worker.ending()}; see the messages above): "
                "is the memory limit too small, or a package missing?"
            )


class _Worker:
    """One child process, and the batch that it is at work on."""

    def __init__(self, arguments: list[str]) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            # A session of its own makes the child the leader of a process group, which is killed as a whole.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "envs.reasoning.verifier_worker", str(theirs.fileno()), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=_environment(),
            )
        self.channel.setblocking(False)
        self.batch: deque[int] = deque()  # items sent and not yet answered, in order; the first one is being judged
        self.outgoing = memoryview(b"")
        self.deadline = 0.0
        self.ready = False
        self._incoming = bytearray()
        self._closed = False

    def send(self, batch: list[int], messages: list[dict[str, Any]]) -> None:
        self.batch.extend(batch)
        self.outgoing = memoryview(frame(messages))
        self.ready = False
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self.flush()

    def flush(self) -> None:
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[self.channel.send(self.outgoing) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self._closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The replies that have arrived in full."""
        try:
            data = self.channel.recv(1 << 20)
        except ConnectionResetError:
            data = b""
        self._closed |= not data
        self._incoming += data
        replies = []
        while len(self._incoming) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._incoming)[0]
            if len(self._incoming) < end:
                break
            replies.append(json.loads(self._incoming[HEADER.size : end]))
            del self._incoming[:end]
        self.ready |= bool(replies)
        return replies

    def cause_of_failure(self) -> str | None:
        if not self.batch:
            return None
        if self._closed:
            return "crash"
        return "timeout" if time.monotonic() > self.deadline else None

    def kill(self) -> None:
        if self._process.returncode is not None:
            return  # killed before, and its number may be another's by now
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.channel.close()

    def ending(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _message(problem: Problem, completion: str) -> dict[str, Any]:
    """What a check may look at: everything but the worked solution."""
    kept = {name: getattr(problem, name) for name in ("id", "prompt", "answer", "verifier", "metadata")}
    return {"problem": kept, "completion": completion}


def _environment() -> dict[str, str]:
    """No secrets of ours, no GPU, one thread: completions are evaluated in there."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(filter(None, [str(_ROOT), kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
