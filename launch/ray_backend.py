"""Carries a run's actors on Ray."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from launch import cluster
from launch.actor_environment import actor_environment
from launch.config import RunConfig
from launch.ray_group import RayGroup, RayShared
from models.errors import UserError


class RayBackend:
    """Starts groups of actors on Ray. One per run; the cluster ends with it if it was started for it."""

    def __init__(self, settings: RunConfig, logs: Path, announce: Callable[[str], None]) -> None:
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            cluster.start(settings.ray_address, logs / "ray.log")
        self._joined = bool(settings.ray_address)
        self._device, self._logs, self._announce = settings.device, logs, announce
        self._groups: list[RayGroup] = []

    def actors(
        self,
        cls: type,
        count: int,
        resources: Mapping[str, float],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        name: str,
    ) -> RayGroup:
        if not self._joined:
            self._check_room(name, count, resources)
        variables = {
            **actor_environment(self._device),
            "OMP_NUM_THREADS": str(max(1, int(resources.get("cpu", 1)))),
            "PYTHONPATH": _import_path(),
        }
        # On a machine of our own Ray need not share out cores: learner and rollouts take turns on the same ones, and
        # "cpu" is the number of threads. GPUs are shared out everywhere.
        placement = resources if self._joined else {**resources, "cpu": 0}
        group = RayGroup(cls, count, placement, args, kwargs, name, self._logs, variables, self._announce)
        self._groups.append(group)
        return group

    def share(self, value: Any) -> RayShared:
        return RayShared(ray.put(value))

    def close(self) -> None:
        for group in self._groups:
            group.close()
        if self._owns_cluster:
            cluster.stop()

    def _check_room(self, name: str, count: int, resources: Mapping[str, float]) -> None:
        """Ray would wait for ever for GPUs that this machine does not have."""
        total = ray.cluster_resources().get("GPU", 0)
        open_groups = [group for group in self._groups if not group.closed]
        wanted = count * resources.get("gpu", 0)
        taken = sum(len(group) * group.resources.get("gpu", 0) for group in open_groups)
        if taken + wanted > total + 1e-6:
            raise UserError(
                f"{count} x {name} need {wanted:g} GPUs, and other actors hold {taken:g} of this machine's {total:g}: "
                "ask for fewer actors or smaller shares, or join a larger cluster with --ray-address"
            )


def _import_path() -> str:
    """What this process added to the interpreter's own import path: a checkout, a test folder, the current one.

    Actors look there first; our own packages come before a folder `models` of the user's.
    """
    own = (sys.prefix, sys.base_prefix)
    paths = [str(Path(entry).resolve()) for entry in sys.path if not entry.startswith(own)]
    return os.pathsep.join(dict.fromkeys([str(Path(__file__).resolve().parent.parent), *paths]))
