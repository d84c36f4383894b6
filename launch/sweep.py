"""A search over a job's settings with Ray Tune: `longstride sweep JOB --space space.yaml`.

    runs/<name>/sweep.yaml   trials/<trial>/ (run directory)  <trial>.yaml (recipe)  <trial>.log  <trial>.json (result)
                trials.json  best.yaml

A trial is a run of its own in a process of its own, named by a digest of its settings; its Ray actor reads the metrics
that the run writes. The same command again goes on where the last one was stopped: unfinished trials resume, and the
search is told what the finished ones gave. (Tune's own files, which are pickles, are never read again.)
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator

from launch import cluster
from launch.console import RunConsole
from launch.disk import refusals_explained, write_atomically
from launch.exit_codes import INTERRUPTED
from launch.run_directory import RunDirectory
from launch.settings_change import refuse_changes
from launch.sweep_search import Settings, Untried, as_drawn, as_set, domain
from launch.sweep_space import Dimension, SweepOptions, with_values
from models.errors import UserError
from models.seeding import derive_seed

OBJECTIVE = "objective"  # Tune's name for the metric
POLL_S = 0.2
STOP_S = 20.0  # for a run to save and end


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What all trials share. folder: absolute. entries: the job's settings as a recipe, of which some vary; defaults:
    what they are if nothing is set."""

    job: str
    folder: Path
    entries: Mapping[str, Any]
    defaults: Mapping[str, Any]
    space: Mapping[str, Dimension]
    options: SweepOptions
    seed: int
    working_directory: str = dataclasses.field(default_factory=os.getcwd)  # Tune gives its actors another

    def trial_file(self, settings: Settings, ending: str) -> Path:
        digest = hashlib.sha256(json.dumps(as_set(settings), sort_keys=True).encode()).hexdigest()
        return self.folder / "trials" / f"{digest[:12]}{ending}"


class Trial(tune.Trainable):
    """One run; a step of it lasts until the run has written the next value of the metric."""

    def setup(self, config: Settings, sweep: Sweep) -> None:  # type: ignore[override]
        self._log, self._metric, self._values_read = sweep.trial_file(config, ".log"), sweep.options.metric, 0
        self._directory = RunDirectory(sweep.trial_file(config, ""))
        name, where = self._directory.root.name, ["--runs-dir", str(self._directory.root.parent)]
        command = ["resume", name, *where]
        if not self._directory.config.exists():
            recipe = sweep.trial_file(config, ".yaml")
            entries = {"job": sweep.job} | with_values(sweep.entries, as_set(config))
            write_atomically(recipe, yaml.safe_dump(entries, sort_keys=False))
            command = ["train", sweep.job, "--recipe", str(recipe), "--name", name, *where]
        self._process: subprocess.Popen[bytes] | None = None
        if self._directory.read_summary().get("status") != "finished":
            with self._log.open("ab") as log:
                command = [sys.executable, "-m", "launch", *command]
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=sweep.working_directory
                )

    def step(self) -> dict[str, Any]:
        while True:
            ended = self._process is None or self._process.poll() is not None  # asked first: nothing is written later
            values = [row[self._metric] for row in self._rows() if self._metric in row]
            if ended:
                self._refuse_failure(values)
            if len(values) > self._values_read:
                self._values_read += 1
                return {OBJECTIVE: values[self._values_read - 1], "done": ended and self._values_read == len(values)}
            if ended:  # it wrote its last value and took its time to end
                return {OBJECTIVE: values[-1], "done": True}
            time.sleep(POLL_S)

    def cleanup(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks at the end; the run has checkpoints of its own."""

    def _refuse_failure(self, values: list[float]) -> None:
        if self._process is not None and self._process.returncode:
            lines = self._log.read_text(errors="replace").splitlines()
            raise RuntimeError(lines[-1] if lines else f"the run ended with exit code {self._process.returncode}")
        if not values:
            names = sorted({name for row in self._rows() for name in row if "/" in name})
            raise RuntimeError(f"the run wrote no {self._metric}; it has {', '.join(names)}")

    def _rows(self) -> list[dict[str, float]]:
        path = self._directory.metrics
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Report(tune.Callback):
    """In the driver: keeps the result of each trial that ends, and prints a line."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        path, value = self._sweep.trial_file(trial.config, ".json"), trial.last_result[OBJECTIVE]
        write_atomically(path, json.dumps({"settings": as_set(trial.config), "value": value}) + "\n")
        self._print(f"trial {path.stem}: {self._sweep.options.metric} {value:.5g} with {_shown(trial.config)}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._print(f"trial with {_shown(trial.config)} failed: see {self._sweep.trial_file(trial.config, '.log')}")

    def _print(self, line: str) -> None:
        RunConsole("sweep").print(line)  # made anew, since Tune pickles this object


def run(sweep: Sweep) -> int:
    """Run all trials, print and write the table; return the exit code.

    Raises UserError if the folder holds another sweep, or if trials failed and none succeeded.
    """
    options, folder = sweep.options, sweep.folder
    described = {"job": sweep.job, "entries": dict(sweep.entries), **dataclasses.asdict(options)}
    described["space"] = {name: {**vars(d), "choices": list(d.choices)} for name, d in sweep.space.items()}
    for may_change in ("trials", "trials_at_once"):
        del described[may_change]
    content = yaml.safe_dump(described, sort_keys=False)
    with refusals_explained(folder, "create the folder"):
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        if (folder / "sweep.yaml").exists():
            defaults = {"entries": dict(sweep.defaults), **dataclasses.asdict(SweepOptions())}
            as_read = yaml.safe_load(content)  # choices that are tuples are lists in the file
            refuse_changes(folder / "sweep.yaml", as_read, defaults, "a sweep")
        write_atomically(folder / "sweep.yaml", content)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are told below, in a line
    errors: list[str] = []
    if (wanted := _wanted(sweep)) < options.trials:
        RunConsole(folder.name).print(
            f"the space has {wanted} different settings: {wanted} trials, not {options.trials}"
        )
    if _missing(sweep):
        cluster.start(log=folder / "ray.log")
        # Tune ends in order on SIGINT alone.
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        before = [signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT)) for number in numbers]
        try:
            if begun := _begun(sweep)[: _missing(sweep)]:
                errors += _search(sweep, _these(sweep, begun), len(begun))
            # Those that were begun are no longer unfinished, unless somebody interrupted them.
            if not errors and not _begun(sweep) and (more := _missing(sweep)):
                errors += _search(sweep, _searcher(sweep, more), more)
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
            cluster.stop()
    return _conclude(sweep, errors)


def _search(sweep: Sweep, searcher: Any, trials: int) -> list[str]:
    """Run trials; return what the failed ones died of."""
    trainable = tune.with_parameters(Trial, sweep=sweep)
    # The run's own process works, the actor waits.
    trainable = tune.with_resources(trainable, tune.PlacementGroupFactory([{"CPU": 0.01}]))
    with tempfile.TemporaryDirectory(prefix="longstride-tune-") as storage:
        results = tune.Tuner(
            trainable,
            param_space={name: domain(dimension) for name, dimension in sweep.space.items()},
            tune_config=tune.TuneConfig(
                metric=OBJECTIVE,
                mode=sweep.options.mode,
                num_samples=trials,
                max_concurrent_trials=sweep.options.trials_at_once,
                search_alg=searcher,
                scheduler=ASHAScheduler() if sweep.options.early_stopping else FIFOScheduler(),
            ),
            run_config=tune.RunConfig(name="tune", storage_path=storage, verbose=0, callbacks=[Report(sweep)]),
        ).fit()
    return [str(error).strip().splitlines()[-1] for error in results.errors]


def _these(sweep: Sweep, settings: list[Settings]) -> BasicVariantGenerator:
    """A search that tries these. Tune's `max_concurrent_trials` is not for it, which would begin them all at once."""
    return BasicVariantGenerator(points_to_evaluate=settings, max_concurrent=sweep.options.trials_at_once)


def _searcher(sweep: Sweep, trials: int) -> Any:
    finished = _finished(sweep)
    seed = derive_seed(sweep.seed, "sweep", len(finished)) % 2**32  # what was drawn before a restart is not drawn again
    recipes = set((sweep.folder / "trials").glob("*.yaml"))
    untried = Untried(sweep.space, seed, partial(sweep.trial_file, ending=".yaml"), recipes)
    if sweep.options.search == "random":
        return _these(sweep, [untried.draw() for _ in range(trials)])
    try:
        from launch.sweep_optuna import UntriedOptuna
    except ImportError:
        raise UserError("--search optuna needs optuna: pip install 'longstride[sweep]', or --search random") from None
    points = [{name: as_drawn(value) for name, value in trial["settings"].items()} for trial in finished]
    values = [trial["value"] for trial in finished]
    return UntriedOptuna(untried, points_to_evaluate=points or None, evaluated_rewards=values or None, seed=seed)


def _finished(sweep: Sweep) -> list[dict[str, Any]]:
    """Settings and value of the trials that ended, best first."""
    found = [json.loads(path.read_text()) for path in sorted((sweep.folder / "trials").glob("*.json"))]
    return sorted(found, key=lambda trial: trial["value"], reverse=sweep.options.mode == "max")


def _begun(sweep: Sweep) -> list[Settings]:
    """Settings of the trials that have a recipe and no result."""
    recipes = sorted((sweep.folder / "trials").glob("*.yaml"))
    unfinished = [path for path in recipes if not path.with_suffix(".json").exists()]
    return [_settings(yaml.safe_load(path.read_text()), sweep.space) for path in unfinished]


def _settings(entries: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any]) -> Settings:
    found = {}
    for name in names:
        value: Any = entries
        for key in name.split("."):
            value = value[key]
        found[name] = as_drawn(value)
    return found


def _wanted(sweep: Sweep) -> int:
    """How many trials: no more than there are settings to try."""
    return int(min(sweep.options.trials, math.prod(dimension.count for dimension in sweep.space.values())))


def _missing(sweep: Sweep) -> int:
    return max(0, _wanted(sweep) - len(_finished(sweep)))


def _conclude(sweep: Sweep, errors: list[str]) -> int:
    console, metric, finished = RunConsole(sweep.folder.name), sweep.options.metric, _finished(sweep)
    if finished:
        with refusals_explained(sweep.folder, "write to"):
            write_atomically(sweep.folder / "trials.json", json.dumps(finished, indent=2) + "\n")
            best = sweep.trial_file(finished[0]["settings"], ".yaml").read_text()
            write_atomically(sweep.folder / "best.yaml", best)
        rows = []
        for trial in finished:
            name = sweep.trial_file(trial["settings"], "").name
            rows.append([name, f"{trial['value']:.5g}", *map(_figure, trial["settings"].values())])
        columns = ["trial", metric, *finished[0]["settings"]]
        console.table(f"{sweep.folder.name}: {len(finished)} trials", columns, rows)
        console.print(f"the best settings: {sweep.folder / 'best.yaml'}, a recipe")
    if errors:
        raise UserError(
            f"{len(errors)} of the trials failed; the first: {errors[0]}; the same command tries them again"
        )
    if _missing(sweep):
        console.print("interrupted: the same command goes on from here")
        return INTERRUPTED
    return 0


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(settings: Settings) -> str:
    return ", ".join(f"{name} {_figure(value)}" for name, value in settings.items())
