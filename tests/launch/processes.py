import time

import psutil


def is_gone(process: psutil.Process, limit_s: float = 60) -> bool:
    """Wait for the end of a process; one that nobody has reaped yet has ended too."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
