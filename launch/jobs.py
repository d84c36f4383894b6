"""The jobs that `longstride train JOB` knows, by the paths of their functions; a job's code loads when it is used."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.errors import UserError, nearest


@dataclass(frozen=True)
class Job:
    """config: the job's dataclass. train and evaluate: functions `(config, run) -> None`.

    The module of `train` may define `plan(config, device) -> list[tuple[what, count, cpu, gpu, GiB]]`, shown by
    `--dry-run`.
    """

    config: str
    train: str
    evaluate: str | None = None
    extra: str = ""
    """The extra of this package that the job needs to be installed."""
    check: str = ""
    """A function `(config, run)` for dry runs: it refuses what `train` refuses up to its first actor, and ends."""

    def config_class(self) -> type:
        return self._load(self.config)

    def trainer(self) -> Callable[[Any, Any], None]:
        return self._load(self.train)

    def evaluator(self) -> Callable[[Any, Any], None] | None:
        return self._load(self.evaluate) if self.evaluate else None

    def _load(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"this job needs the module {module}, which is not part of this installation"
                ) from error
            if self.extra:
                raise UserError(
                    f"this job needs the package {error.name}: pip install 'longstride[{self.extra}]'"
                ) from error
            raise

    def checker(self) -> Callable[[Any, Any], None] | None:
        return self._load(self.check) if self.check else None

    def plan(self, config: Any, device: str) -> list[tuple[str, int, float, float, float]]:
        """Empty if the job has none."""
        planner = getattr(importlib.import_module(self.train.partition(":")[0]), "plan", None)
        return planner(config, device) if planner else []


def _in(module: str, config: str, extra: str = "", check: str = "") -> Job:
    """A job whose config and functions lie in one module."""
    return Job(f"{module}:{config}", f"{module}:train", f"{module}:evaluate", extra, check)


def _vision(module: str, config: str) -> Job:
    return _in(module, config, "vision", f"{module}:check")


def _control(module: str, config: str) -> Job:
    """Nothing of these comes before their first actor but checks: a dry run begins to train."""
    return _in(module, config, check=f"{module}:train")


JOBS: dict[str, Job] = {
    # language models
    "reason": Job(
        "llm_rl.config:ReasonConfig", "llm_rl.reason:train", "llm_rl.reason:evaluate", check="llm_rl.reason:check"
    ),
    "sft": Job("llm_rl.config:SFTJobConfig", "llm_rl.sft:train", check="llm_rl.sft:check"),
    # control
    "qac": _control("agents.qac", "QACConfig"),
    "a2c": _control("agents.a2c", "A2CConfig"),
    "trpo": _control("agents.trpo", "TRPOConfig"),
    "ppo": _control("agents.ppo", "PPOConfig"),
    "offpac": _control("agents.offpac", "OffPACConfig"),
    "ddpg": _control("agents.ddpg", "DDPGConfig"),
    "td3": _control("agents.td3", "TD3Config"),
    "sac": _control("agents.sac", "SACConfig"),
    # vision
    "diffusion": _vision("agents.vision.diffusion", "DiffusionConfig"),
    "ddpo": _vision("agents.vision.ddpo", "DDPOConfig"),
    "detr": _vision("agents.vision.detr", "DetrJobConfig"),
    "detr-rl": _vision("agents.vision.detr_rl", "DetrRLConfig"),
}


def find(name: str) -> Job:
    """Raises UserError naming the nearest job."""
    if name not in JOBS:
        raise UserError(f"unknown job {name!r}: did you mean {nearest(name, JOBS)}? Jobs: {', '.join(JOBS)}")
    return JOBS[name]
