"""The process around one actor: its log file, its threads, and the actor itself."""

import faulthandler
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


class Host:
    """Runs as a Ray actor and holds an object of the trainer's class.

    Arguments travel flat (`values`, the last of them named by `names`), since Ray hands over only top-level references
    as the objects they stand for.
    """

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.enable(file=2)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}", flush=True)
        self._actor: Any = None

    def whereabouts(self) -> tuple[str, int]:
        """Machine and process id."""
        return platform.node(), os.getpid()

    def build(self, cls: type, names: list[str], *values: Any) -> None:
        args, kwargs = _split(names, values)
        self._actor = cls(*args, **kwargs)

    def call(self, method: str, names: list[str], *values: Any) -> Any:
        args, kwargs = _split(names, values)
        return getattr(self._actor, method)(*args, **kwargs)

    def call_and_keep(self, method: str, names: list[str], *values: Any) -> tuple[None, Any]:
        """Two results: one to wait for, and one that stays in the object store."""
        return None, self.call(method, names, *values)


def _split(names: list[str], values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    first = len(values) - len(names)
    return values[:first], dict(zip(names, values[first:], strict=True))
