"""Run one job from its first step to its exit code, whatever ends it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from launch.exit_codes import INTERRUPTED
from launch.runtime import Runtime
from models.errors import UserError


def execute(function: Callable[[Any, Any], None], config: Any, run: Runtime) -> int:
    """Call `function(config, run)`; settle the run's status; close the run; return the exit code.

    Ctrl-C, SIGTERM and a closed terminal end the job in order (status interrupted, exit code 130); a second Ctrl-C or
    SIGTERM ends it at once.
    Any other exception passes on after the status `failed` is written.
    """
    with interruptible():
        try:
            function(config, run)
            run.finish("finished")
            return 0
        except KeyboardInterrupt:
            run.finish("interrupted")
            return INTERRUPTED
        except BaseException:
            _settle_failure(run)
            raise
        finally:
            run.close()


def _settle_failure(run: Runtime) -> None:
    try:
        run.summarize({}, "failed")
    except UserError as refusal:  # a full disk, say: the failure that got us here is the one to report
        run.console.print(f"the summary could not be written: {refusal}")


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt; from then on SIGINT and SIGTERM end the
    process at once. A terminal that closes sends SIGHUP twice, itself and through its shell, so that one does not; and
    nohup has it ignored."""

    def at_once(signum: int, frame: FrameType | None) -> None:
        for process in psutil.Process().children(recursive=True):  # Ray leaves a stopped worker behind now and then
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(INTERRUPTED)

    def first(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else at_once)
        raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, first) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
