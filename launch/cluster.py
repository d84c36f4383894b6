"""Ray on this machine, or a cluster that is already there; and the backend that carries actors on it.

A cluster of our own listens on loopback only and is as small as Ray can be made: no dashboard, no autoscaler monitor,
no log monitor (actors write their own log files), no idle workers. Its processes end with the driver, also after a
kill -9 of it, since Ray ties them to the thread that called ray.init (PR_SET_PDEATHSIG): call `start` in the main
thread.
"""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants
import ray._private.worker

from launch.actor_environment import actor_environment
from launch.config import RunConfig
from launch.ray_group import RayGroup, RayShared
from models.errors import UserError

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # errors reach the trainer through its Futures
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves rollouts whenever the learner is busy
    "RAY_process_group_cleanup_enabled": "1",  # what an actor forked does not outlive it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def start(address: str = "", log: Path = Path(os.devnull)) -> None:
    """Connect this process to the cluster at `address`, or to one of its own. Raises UserError if none answers.

    log: receives what Ray has to say about its processes, which would else be printed between the lines of the run.
    """
    os.environ.update(_SETTINGS)
    ray._private.worker.print_to_stdstream = partial(_write_messages, log.resolve())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(f"--ray-address {address}: no Ray cluster answers there ({first_line})") from error
    else:
        # Without this Ray looks up an outward address and its servers listen on all of them; on Windows and macOS,
        # where it has no clusters, they listen on loopback.
        os.environ[ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=max(512 << 20, psutil.virtual_memory().total // 10),
            _temp_dir=str(_session_folder()),
            **quiet,
        )
        _drop_helpers()
    for number, handler in handlers.items():
        signal.signal(number, handler)  # ray.init puts its own there


def stop() -> None:
    """Leave the cluster; one of our own ends with it."""
    ray.shutdown()
    shutil.rmtree(_session_folder(), ignore_errors=True)


def _write_messages(log: Path, data: Mapping[str, Any], ignore_prefix: bool) -> None:
    with log.open("a") as file:
        file.writelines(f"{line}\n" for line in data["lines"])


def _drop_helpers() -> None:
    """End three processes that ray.init starts whether they are wanted or not: 270 MB of resident memory."""
    node: Any = ray._private.worker._global_node
    for end in (node.kill_monitor, node.kill_log_monitor, node.kill_dashboard):
        end(check_alive=False)


def _session_folder() -> Path:
    """A short path (the names of Unix sockets in it may not exceed 107 bytes), private to this process.

    Folders of drivers that were killed are removed on the way.
    """
    root = Path(tempfile.gettempdir())
    if len(str(root)) > 20:
        root = Path("/tmp")
    for folder in root.glob("longstride-*"):
        if (pid := re.fullmatch(r"longstride-(\d+)", folder.name)) and not psutil.pid_exists(int(pid[1])):
            shutil.rmtree(folder, ignore_errors=True)
    return root / f"longstride-{os.getpid()}"


class RayBackend:
    """Starts groups of actors on Ray. One per run; the cluster ends with it if it was started for it."""

    def __init__(self, settings: RunConfig, logs: Path, announce: Callable[[str], None]) -> None:
        self._owns_cluster = not ray.is_initialized()
        if self._owns_cluster:
            start(settings.ray_address, logs / "ray.log")
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
            stop()

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
    """What this process added to the interpreter's own import path: a checkout, a test folder."""
    own = (sys.prefix, sys.base_prefix)
    paths = [str(Path(entry).resolve()) for entry in sys.path if not entry.startswith(own)]
    return os.pathsep.join(dict.fromkeys(paths))
