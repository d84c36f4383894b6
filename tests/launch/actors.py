"""Actors of the tests. They do not import torch, and start the faster for it."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Counter:
    """Remembers the calls it got; knows every way to go wrong."""

    def __init__(self, base: int = 0, actor_index: int = -1) -> None:
        self.base, self.index = base, actor_index
        self.calls: list[Any] = []
        self.weights: float | None = None

    def whereabouts(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "index": self.index, "base": self.base, "threads": os.environ["OMP_NUM_THREADS"]}

    def note(self, what: Any) -> list[Any]:
        self.calls.append(what)
        return self.calls

    def load(self, weights: np.ndarray) -> float:
        self.weights = float(weights.sum())
        return self.weights

    def scale(self, factor: float) -> None:
        assert self.weights is not None, "scale came before load"
        self.weights *= factor

    def held(self) -> float | None:
        return self.weights

    def array(self, size: int) -> np.ndarray:
        return np.arange(size, dtype=np.float64)

    def total(self, array: np.ndarray) -> tuple[float, bool]:
        return float(array.sum()), array.flags.writeable

    def sleep(self, seconds: float) -> float:
        print(f"asleep for {seconds} s")
        time.sleep(seconds)
        return seconds

    def refuse(self) -> None:
        raise LookupError("no such thing")

    def crash(self) -> None:
        ctypes.string_at(0)

    def leave(self, code: int) -> None:
        sys.exit(code)

    def fork(self) -> int:
        return subprocess.Popen(["sleep", "600"]).pid


class Sampler:
    """Draws targets from nothing but its arguments, so a call may be repeated."""

    def __init__(self) -> None:
        self.shift = 0.0

    def load(self, shift: float) -> None:
        self.shift = shift

    def draw(self, seed: int, width: int, pause: float) -> np.ndarray:
        time.sleep(pause)
        return np.random.default_rng(seed).normal(size=width) + self.shift


class Picky:
    """Cannot be built."""

    def __init__(self) -> None:
        raise LookupError("not with these arguments")


class OnceOnly:
    """Can be built once; every later process dies while it builds."""

    def __init__(self, marker: Path) -> None:
        if marker.exists():
            os._exit(7)
        marker.touch()

    def pid(self) -> int:
        return os.getpid()
