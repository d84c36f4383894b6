"""The child process of `envs.reasoning.verifier_pool`: reads batches from a socket, answers item by item.

A check that may run what it reads (`envs.reasoning.verify.needs_fork`) judges each item in a fork of this process,
which ends with it: what an answer does to the interpreter, to memory or to imported modules, no other item sees. A fork
cannot write into files, and nothing that it has started outlives it; an ordinary user's starts no process or thread.
What is not prevented: code that runs in a fork reads what the user may read, removes files, uses the network, and can
report a reward of its own for its one item. `envs.reasoning.evaluated_answers` keeps an answer from being such code.

    python -m envs.reasoning.verifier_worker SOCKET_FD MEMORY_LIMIT_MIB [MODULE ...]

The modules are imported first and may register checks. A frame is a 4-byte big-endian length and that much JSON:

    pool → worker   [{"problem": {...}, "completion": "..."}, ...]
    worker → pool   {"ready": true}   when what the batch needs is imported, then for each item, in order,
                    {"reward": r, "reason": "..."} or {"error": "..."}
"""

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from envs.reasoning.problem import Problem
from models.errors import unknown_name

HEADER = struct.Struct(">I")
_REPLY_BYTES = 65536  # what a pipe holds: a fork writes its reply and ends, and nobody reads meanwhile
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl


def frame(message: Any) -> bytes:
    """One message as it goes over the socket."""
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    _confine(memory_limit_mib=int(sys.argv[2]))
    for module in sys.argv[3:]:
        importlib.import_module(module)
    while (batch := _receive(channel)) is not None:
        items = [(Problem(**item["problem"]), item["completion"]) for item in batch]
        _prepare([problem for problem, _ in items])
        channel.sendall(frame({"ready": True}))
        for problem, completion in items:
            channel.sendall(frame(_judge(problem, completion, channel)))


def _confine(memory_limit_mib: int) -> None:
    limit = memory_limit_mib * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of a fork become children of this process
    # Standard input is a pipe that nothing is written to. When the pool's process ends, however it ends, the kernel
    # sends this one and its forks SIGIO, which is fatal even while they hang in C code.
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _prepare(problems: Sequence[Problem]) -> None:
    """Import and build what is slow here, where it does not count against an item's time and the forks inherit it.

    Raises UserError for an unknown verifier: that is no fault of a completion, and ends the worker.
    """
    from envs.reasoning.verify import CHECKS, warm_up

    for name in {problem.verifier for problem in problems} - CHECKS.keys():
        raise unknown_name("verifier", name, CHECKS)
    warm_up(problems)


def _judge(problem: Problem, completion: str, channel: socket.socket) -> dict[str, Any]:
    from envs.reasoning.verify import needs_fork

    if not needs_fork(problem):
        return _verdict(problem, completion)
    reading, writing = os.pipe()
    fork = os.fork()
    if fork == 0:
        try:
            channel.close()
            _confine_fork()
            os.write(writing, json.dumps(_verdict(problem, completion)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    _, status = os.waitpid(fork, 0)
    _end_offspring()
    data = os.read(reading, _REPLY_BYTES)
    os.close(reading)
    try:
        reply = json.loads(data)
        return {"error": str(reply["error"])} if "error" in reply else _checked(reply["reward"], reply["reason"])
    except (ValueError, TypeError, LookupError):  # nothing, or not what a verdict looks like
        code = os.waitstatus_to_exitcode(status)
        return {"error": f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"}


def _confine_fork() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the pool kills the worker's process group, which it may leave
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # root is exempt
    sys.dont_write_bytecode = True
    # Standard output is /dev/null. Errors go there too: warnings of what an answer holds, and the answers that
    # math-verify quotes, would fill the pool's terminal or log as fast as a policy provokes them.
    os.dup2(1, 2)


def _end_offspring() -> None:
    """Kill what a fork left behind, though it may have a session of its own by now."""
    while True:
        try:
            process, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            import psutil  # seldom needed

            for orphan in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
            os.waitpid(-1, 0)


def _verdict(problem: Problem, completion: str) -> dict[str, Any]:
    from envs.reasoning.verify import CHECKS

    try:
        verdict = CHECKS[problem.verifier](problem, completion)
        return _checked(verdict.reward, verdict.reason)
    except Exception as error:  # noqa: BLE001 - whatever a verifier raises costs this one item
        return {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}


def _checked(reward: float, reason: str) -> dict[str, Any]:
    if not 0.0 <= reward <= 1.0:  # also NaN
        raise ValueError(f"the reward {reward} is outside [0, 1]")
    return {"reward": float(reward), "reason": str(reason)}


def _receive(channel: socket.socket) -> list[dict[str, Any]] | None:
    header = _read(channel, HEADER.size)
    return None if header is None else json.loads(_read(channel, HEADER.unpack(header)[0]) or b"[]")


def _read(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
