"""Two cores for one gradient step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class SideBySide:
    """Calls two functions at once if it has two threads, one after the other if it has one; the results are the same.

    torch lets go of the interpreter while it computes. The matrices of a control agent are too small to be split among
    threads with profit, but its critic and its actor are two jobs of the same length.
    """

    def __init__(self, threads: int) -> None:
        _one_thread_each()
        self.pool = ThreadPoolExecutor(1, initializer=_one_thread_each) if threads > 1 else None

    def __call__(self, here: Callable[[], A], beside: Callable[[], B]) -> tuple[A, B]:
        if self.pool is None:
            return here(), beside()
        future = self.pool.submit(beside)
        return here(), future.result()


def _one_thread_each() -> None:
    torch.set_num_threads(1)
