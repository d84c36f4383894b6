"""The `longstride` command.

longstride train JOB [--recipe FILE_OR_NAME] [--dry-run] [--seeds N] [--any.config.field value]
longstride sweep JOB --space FILE [--recipe FILE_OR_NAME] [--trials N] [--any.config.field value]
longstride evaluate RUN_OR_CHECKPOINT [--any.config.field value]
longstride resume RUN
longstride runs
longstride inspect CONFIG_OR_MODEL_FOLDER [--depth N] [--width N] [--vary FIELD=VALUE,VALUE] [...]
longstride doctor

RUN is the name of a run under --runs-dir (NAME/seed-0 of several seeds), the path of a run directory, or `latest`, the
single run that was started last. `longstride train JOB --help` lists a job's settings.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from launch import jobs
from launch.config import (
    RunConfig,
    TrainOptions,
    apply_entries,
    as_entries,
    combine,
    default_entries,
    parse,
    read_recipe,
)
from launch.console import RunConsole
from launch.exit_codes import INTERRUPTED, USER_ERROR
from launch.run_directory import RunDirectory, folder_to_fill
from launch.run_table import show_runs
from models.errors import ActorsFailed, UserError, nearest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    asks_for_help = bool({"-h", "--help"}.intersection(arguments[:2])) and arguments[0] not in {"runs", "doctor"}
    if not arguments or asks_for_help:
        print(__doc__)
        print("jobs:", ", ".join(jobs.JOBS))
        return 0 if arguments else USER_ERROR
    command, *rest = arguments
    _import_from_here()
    before = signal.signal(signal.SIGINT, _leave)
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}: did you mean {nearest(command, COMMANDS)}?")
        return COMMANDS[command](rest)
    except UserError as error:
        print(f"longstride: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C before a job has begun (launch/execution.py sees to it then): for seconds packages are imported, and in
    torch's C++ a KeyboardInterrupt would be an abort."""
    os.write(2, b"longstride: interrupted\n")
    os._exit(INTERRUPTED)


def _import_from_here() -> None:
    """Let `--env mine:Lander-v0` find mine.py in the current folder, where `python -m` looks and a console script does
    not. Behind everything else, and behind our own packages: a folder `models` of the user's hides none of ours."""
    for folder in (str(Path(__file__).parent.parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)


def train(arguments: Sequence[str]) -> int:
    name, flags = _positional("train", "JOB", arguments)
    job, config, entries = _configured("train", name, flags, TrainOptions)
    _check_device(config.run)
    if config.options.dry_run:
        if config.run.name and config.options.seeds == 1:  # several seeds may go on in a folder that exists
            RunDirectory.free(config.run.runs_dir, config.run.name)
        job.trainer()
        if check := job.checker():
            from launch.dry_run import rehearse

            rehearse(check, config.job, config.run)
        RunConsole(name).print(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
        _print_plan(name, job, config)
        return 0
    trainer = job.trainer()
    entries["name"] = config.run.name or _free_name(config.run.runs_dir, name)
    if config.options.seeds > 1:
        from launch.seeds import train_seeds

        seeds = range(config.run.seed, config.run.seed + config.options.seeds)
        defaults = default_entries(job.config_class())
        return train_seeds(name, entries, defaults, entries["name"], seeds, config.options.seeds_at_once)
    import launch.execution  # noqa: F401  (so that no run directory waits for its imports)

    directory = RunDirectory.create(config.run.runs_dir, entries["name"], entries)
    try:
        return _run(name, trainer, config, directory, None)
    except UserError as error:
        if not isinstance(error, ActorsFailed) and not directory.has_begun():
            directory.discard()  # nothing was trained: the name is free for the corrected command
        raise


def sweep(arguments: Sequence[str]) -> int:
    name, flags = _positional("sweep", "JOB", arguments)
    from launch.sweep_space import SweepOptions, read_space

    job, config, entries = _configured("sweep", name, flags, SweepOptions)
    _check_device(config.run)
    runs_dir = config.run.runs_dir
    folder = folder_to_fill(runs_dir, config.run.name or _free_name(runs_dir, f"sweep-{name}"), "sweep.yaml")
    shared = {key: value for key, value in entries.items() if key not in ("job", "name", "runs_dir")}
    combined = combine("Trial", run=RunConfig, job=job.config_class())
    space = read_space(config.options.space, shared, lambda trial: apply_entries(combined, trial, config.options.space))
    try:
        from launch.sweep import Sweep, run
    except ImportError as error:
        raise UserError(f"a sweep needs Ray Tune ({error}): pip install 'longstride[sweep]'") from None
    defaults = default_entries(job.config_class())
    return run(Sweep(name, folder.resolve(), shared, defaults, space, config.options, config.run.seed))


def resume(arguments: Sequence[str]) -> int:
    run, flags = _positional("resume", "RUN", arguments)
    directory = RunDirectory.open(_runs_dir("resume", flags), run)
    job_name, job, config = _stored_config(directory)
    _check_device(config.run)
    directory.lock()  # before looking for the newest checkpoint, so that nobody writes a newer one
    from launch.resumption import checkpoint_to_resume

    try:
        if directory.read_summary().get("status") == "finished":
            raise UserError(
                f"{directory.root} is finished already: see its summary.json, or train under another --name"
            )
        checkpoint = checkpoint_to_resume(directory)
    except UserError:
        directory.unlock()
        raise
    return _run(job_name, job.trainer(), config, directory, checkpoint)


def evaluate(arguments: Sequence[str]) -> int:
    target, flags = _positional("evaluate", "RUN_OR_CHECKPOINT", arguments)
    from launch.checkpoint import CheckpointStore, read

    path = Path(target).resolve()  # also from within the run's directory
    if path.parent.name == "checkpoints" and path.is_dir():
        directory = RunDirectory.open(path.parent.parent.parent, path.parent.parent.name)
        try:
            checkpoint = read(path)
            damage = checkpoint.damage()
        except ValueError as error:
            damage = str(error)
        if damage:
            raise UserError(f"the checkpoint {target} cannot be used: {damage}")
    else:
        directory = RunDirectory.open(_runs_dir("evaluate", flags, in_part=True), target)
        newest = CheckpointStore(directory.checkpoints, keep=1).newest()
        if newest is None:
            raise UserError(f"{directory.root} has no complete checkpoint yet: nothing to evaluate")
        checkpoint = newest
    name, job, config = _stored_config(directory, flags)
    _check_device(config.run)
    evaluator = job.evaluator()
    if evaluator is None:
        raise UserError(f"the job {name} has no evaluation of its own")
    from launch.execution import execute
    from launch.runtime import EvaluationRuntime

    return execute(evaluator, config.job, EvaluationRuntime(name, config.run, directory, checkpoint, flags))


def runs(arguments: Sequence[str]) -> int:
    show_runs(_runs_dir("runs", arguments))
    return 0


def inspect(arguments: Sequence[str]) -> int:
    target, flags = _positional("inspect", "CONFIG_OR_MODEL_FOLDER", arguments)
    from launch.inspection import InspectOptions, run

    combined = combine("Inspect", options=InspectOptions)
    return run(target, parse(combined, flags, source="inspect", prog="longstride inspect CONFIG").options)


def doctor(arguments: Sequence[str]) -> int:
    from launch.doctor import report

    return report(_runs_dir("doctor", arguments))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "sweep": sweep,
    "resume": resume,
    "runs": runs,
    "inspect": inspect,
    "doctor": doctor,
}


@dataclasses.dataclass(frozen=True)
class _Where:
    runs_dir: Path = Path("runs")
    """Folder that holds the run directories."""


def _runs_dir(command: str, flags: Sequence[str], in_part: bool = False) -> Path:
    combined = combine("Where", where=_Where)
    return parse(combined, flags, source=command, prog=f"longstride {command}", in_part=in_part).where.runs_dir


def _configured(command: str, name: str, flags: Sequence[str], options_class: type) -> tuple[jobs.Job, Any, dict]:
    """The job, its configuration from recipe and flags, and that configuration as a recipe has it, options left out."""
    job = jobs.find(name)
    combined = combine(command.title(), options=options_class, run=RunConfig, job=job.config_class())
    source, prog = f"{command} {name}", f"longstride {command} {name}"
    options = parse(combine("Options", options=options_class), flags, source=source, prog=prog, in_part=True).options
    base = combined()
    if options.recipe:
        base = apply_entries(combined, read_recipe(options.recipe, name), f"recipe {options.recipe}")
    config = parse(combined, flags, base, source=source, prog=prog)
    entries = {"job": name, **as_entries(config)}
    for option in dataclasses.fields(options_class):
        del entries[option.name]
    return job, config, entries


def _positional(command: str, what: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"usage: longstride {command} {what} [--flags]; the {what} comes first")
    return arguments[0], list(arguments[1:])


def _stored_config(directory: RunDirectory, flags: Sequence[str] = ()) -> tuple[str, jobs.Job, Any]:
    entries = directory.read_config()
    name = entries.pop("job")
    job = jobs.find(name)
    combined = combine("Stored", run=RunConfig, job=job.config_class())
    stored = apply_entries(combined, entries, str(directory.config))
    return name, job, parse(combined, flags, stored, source="evaluate", prog="longstride evaluate RUN")


def _run(name: str, trainer: Any, config: Any, directory: RunDirectory, checkpoint: Any) -> int:
    from launch.execution import execute
    from launch.runtime import Runtime

    return execute(trainer, config.job, Runtime(name, config.run, directory, checkpoint))


def _check_device(run: RunConfig) -> None:
    if run.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or see `longstride doctor`")


def _free_name(runs_dir: Path, job: str) -> str:
    name = f"{job}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, free = 2, name
    while (runs_dir / free).exists():
        number, free = number + 1, f"{name}-{number}"
    return free


def _print_plan(name: str, job: jobs.Job, config: Any) -> None:
    plan = job.plan(config.job, config.run.device)
    if not plan:
        RunConsole("plan").print(f"no placement plan: the job {name} has none")
        return
    rows = [[what, str(count), f"{cpu:g}", f"{gpu:g}", f"{gib:.2f}"] for what, count, cpu, gpu, gib in plan]
    cpus, gpus, memory = (sum(row[1] * float(row[i]) for row in plan) for i in (2, 3, 4))
    rows.append(["total", "", f"{cpus:g}", f"{gpus:g}", f"{memory:.2f}"])
    RunConsole("plan").table("placement", ["what", "count", "CPUs each", "GPUs each", "GiB each"], rows)
