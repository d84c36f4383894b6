"""A limit, in seconds, on each step of an environment."""

import signal
import threading
from types import FrameType
from typing import Any

from models.errors import UserError


class StepLimit:
    """Within, a step that began with `begin()` and takes longer than `seconds` raises UserError out of itself.

    An alarm signal, so it ends whatever Python waits for, but not a loop in C code that never comes back; that the
    trainer's limit on the whole call ends, together with the worker's process. Only the main thread gets signals: in
    another one nothing is limited here.
    """

    def __init__(self, env_id: str, seconds: float) -> None:
        self.env_id, self.seconds = env_id, seconds
        self.active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StepLimit":
        if self.active:
            self._handler = signal.signal(signal.SIGALRM, self._ring)
            self._remaining, _ = signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def begin(self) -> None:
        if self.active:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *error: Any) -> None:
        if self.active:
            signal.setitimer(signal.ITIMER_REAL, self._remaining)  # whoever had set an alarm gets it back
            signal.signal(signal.SIGALRM, self._handler)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        raise UserError(
            f"environment {self.env_id} took more than {self.seconds:g} s over one step: mend it, or allow more with "
            "--step-timeout-s"
        )
