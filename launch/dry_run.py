"""A Run that starts nothing: what a job checks before it starts its actors, without the actors."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.config import RunConfig


class _NothingStarted(Exception):
    """A job's checks have come to its first actor."""


class DryRun:
    """As much of the Run as a job needs up to there; its directory is a temporary one."""

    def __init__(self, settings: RunConfig, directory: Path) -> None:
        self.name, self.seed, self.device, self.directory = settings.name, settings.seed, settings.device, directory

    def actors(self, *_: Any, **__: Any) -> Any:
        raise _NothingStarted


def rehearse(check: Callable[[Any, Any], None], config: Any, settings: RunConfig) -> None:
    """Call `check(config, run)` with a DryRun. Raises the UserError that the job itself would raise."""
    with tempfile.TemporaryDirectory() as directory, suppress(_NothingStarted):
        check(config, DryRun(settings, Path(directory)))
