"""Why an actor's process ended, as far as it can be told from outside.

Ray reports that the connection broke. The signal itself is known only to the process's parent, so the cause is put
together from what is left: Python's fault handler writes to the actor's log, the kernel counts the processes that it
killed for memory, and Ray says when it ended the process itself.
"""

import re
from dataclasses import dataclass
from pathlib import Path

TAIL = 15  # lines of the log
READ_BYTES = 1 << 20  # of its end; a chatty actor writes far more


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for lack of memory since it started (0 if it does not say)."""
    try:
        match = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class BirthRecord:
    """What has to be remembered from an actor's start to judge its end."""

    log: Path
    log_size: int
    oom_kills: int

    @classmethod
    def now(cls, log: Path) -> "BirthRecord":
        return cls(log, log.stat().st_size if log.exists() else 0, oom_kills())

    def written(self) -> str:
        """What the process wrote to its log, the end of it."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self.log_size, self.log.stat().st_size - READ_BYTES))
            return file.read().decode(errors="replace")


def cause_of_death(birth: BirthRecord, report: str) -> str:
    """report: Ray's account of the end."""
    written = birth.written()
    if fault := re.search(r"^Fatal Python error: (.*)$", written, re.MULTILINE):
        return f"crashed: {fault[1]}"
    if re.search(r"memory pressure|OutOfMemory|running low on memory", report):
        return f"ended by Ray's memory monitor: {_first_sentence(report)}"
    if code := re.search(r"exit code (\d+)|exit_code=(\d+)", report):
        return f"ended itself with exit code {code[1] or code[2]}"
    if oom_kills() > birth.oom_kills:
        return "killed by the kernel for lack of memory (SIGKILL, OOM killer)"
    if "connection error" in report or "unexpectedly" in report:
        return "ended without a word: killed from outside (SIGKILL; not by this machine's OOM killer) or by os._exit"
    return _first_sentence(report)


def last_lines(birth: BirthRecord) -> str:
    lines = birth.written().splitlines()[-TAIL:]
    if not lines:
        return f"Nothing was written to {birth.log}."
    return "\n".join([f"Last lines of {birth.log}:", *(f"    {line}" for line in lines)])


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0]
