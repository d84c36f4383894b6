"""A training run in a process of its own."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def follow(command: Sequence[str], runs_dir: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the command, which trains `name`, and print its steps. Returns its lines of metrics and its summary.

    All that it says is kept in NAME.log. Raises SystemExit with the end of that if it fails.
    """
    with (runs_dir / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if line.startswith("step"):
                print(f"{name}: {line}", end="", flush=True)
        if process.wait():
            log.flush()
            raise SystemExit((runs_dir / f"{name}.log").read_text()[-3000:])
    entries = [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text().splitlines()]
    return entries, json.loads((runs_dir / name / "summary.json").read_text())
