"""The child process of `envs.reasoning.verifier_pool`: reads batches from a socket, answers item by item.

    python -m envs.reasoning.verifier_worker SOCKET_FD MEMORY_LIMIT_MIB [MODULE ...]

The modules are imported first and may register checks. A frame is a 4-byte big-endian length and that much JSON:

    pool → worker   [{"problem": {...}, "completion": "..."}, ...]
    worker → pool   {"ready": true}   when what the batch needs is imported, then for each item, in order,
                    {"reward": r, "reason": "..."} or {"error": "..."}
"""

import fcntl
import importlib
import json
import os
import resource
import socket
import struct
import sys
import traceback
from typing import Any

from envs.reasoning.problem import Problem
from models.errors import unknown_name

HEADER = struct.Struct(">I")


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
        _prepare({item["problem"]["verifier"] for item in batch})
        channel.sendall(frame({"ready": True}))
        for item in batch:
            channel.sendall(frame(_judge(item)))


def _confine(memory_limit_mib: int) -> None:
    limit = memory_limit_mib * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Standard input is a pipe that nothing is written to. When the pool's process ends, however it ends, the kernel
    # sends this one SIGIO, which is fatal even while it hangs in C code.
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _prepare(verifiers: set[str]) -> None:
    """Import what is slow to import here, where it does not count against an item's time.

    Raises UserError for an unknown verifier: that is no fault of a completion, and ends the worker.
    """
    from envs.reasoning.verify import CHECKS

    for name in verifiers - CHECKS.keys():
        raise unknown_name("verifier", name, CHECKS)
    if "gym" in verifiers:
        importlib.import_module("reasoning_gym")
    if "math" in verifiers:
        importlib.import_module("math_verify")


def _judge(item: dict[str, Any]) -> dict[str, Any]:
    from envs.reasoning.verify import CHECKS

    try:
        problem = Problem(**item["problem"])
        verdict = CHECKS[problem.verifier](problem, item["completion"])
        if not 0.0 <= verdict.reward <= 1.0:  # also NaN
            raise ValueError(f"the reward {verdict.reward} is outside [0, 1]")
        return {"reward": float(verdict.reward), "reason": str(verdict.reason)}
    except Exception as error:  # noqa: BLE001 - whatever a verifier raises costs this one item
        return {"error": "".join(traceback.format_exception_only(error)).strip()[:500]}


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
