"""How a benchmark's figures are kept: a JSON list, the newest entry last."""

import json
import platform
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import psutil


def end_in_order() -> None:
    """From now on SIGTERM, a time limit's, runs `finally` clauses, which write what was measured until then."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def write_result(
    path: Path, benchmark: str, ours: Any, peer: Any = None, ratio: Any = None, machine: str = "", command: str = ""
) -> None:
    """Append one entry. command: what was run, this process's own command line if empty."""
    entries = json.loads(path.read_text()) if path.exists() else []
    entries.append(
        {
            "benchmark": benchmark,
            "command": command or " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "machine": machine or describe_machine(),
            "commit": _commit(),
            "date": date.today().isoformat(),
            "ours": ours,
            "peer": peer or {},
            "ratio": ratio or {},
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=2) + "\n")


def describe_machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    text = f"{psutil.cpu_count()} x {_processor()}, {memory:.0f} GiB, Python {platform.python_version()}"
    import torch

    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name(0)}"
    return f"{text}, torch {torch.__version__}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
