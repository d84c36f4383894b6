"""Ray on this machine, or a cluster that is already there.

A cluster of our own listens on loopback only and is as small as Ray can be made: no dashboard, no autoscaler monitor,
no log monitor (actors write their own log files), no idle workers. Its processes end with the driver, also after a
kill -9 of it, since Ray ties them to the thread that called ray.init (PR_SET_PDEATHSIG): call `start` in the main
thread.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.node
import ray._private.ray_constants
import ray._private.utils
import ray._private.worker

from models.errors import UserError

STARTS = 3  # tries at a cluster of our own, of half a minute each
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
    """Connect this process to the cluster at `address`, or to one of its own. Raises UserError if there is none.

    log: receives what Ray has to say about its processes, which would else be printed between the lines of the run.
    """
    os.environ.update(_SETTINGS)
    ray._private.worker.print_to_stdstream = partial(_write_messages, log.resolve())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address:
        _join(address, quiet)
    else:
        # Without this Ray looks up an outward address and its servers listen on all of them; on Windows and macOS,
        # where it has no clusters, they listen on loopback.
        os.environ[ray._private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        # Other users of the machine reach loopback too. Ray would keep its token in the home folder, which may not be
        # writable; this one lives as long as the run.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        folder = _session_folder()
        _sweep(folder.parent)
        _start_own(folder, quiet, log)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # ray.init puts its own there


def _start_own(folder: Path, quiet: Mapping[str, Any], log: Path) -> None:
    """Where others keep the processors busy Ray may give up its own start (its server waits 15 s for its agents, a
    limit that it does not let us set: https://github.com/ray-project/ray/issues/65983), and a later try succeed.
    Raises UserError if none does."""
    before = set(psutil.Process().children())
    for attempt in range(1, STARTS + 1):
        try:
            with _servers_alone(), _in_own_group():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=max(512 << 20, psutil.virtual_memory().total // 10),
                    _temp_dir=str(folder),
                    **quiet,
                )
            return
        except Exception as error:  # Ray has no narrower one for this
            if "timed out during startup" not in str(error):
                raise
            _write_messages(log, {"lines": [f"start {attempt} of {STARTS}: {error}"]}, False)
            left = set(psutil.Process().children()) - before  # its servers
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=10)
    load, processors = psutil.getloadavg()[0], psutil.cpu_count()
    raise UserError(
        f"Ray did not start, {STARTS} times in a row, since its processes got no time (load average {load:.0f} on "
        f"{processors} processors): try again when the machine has less to do, or add --backend local, without Ray"
    )


@contextmanager
def _in_own_group() -> Iterator[None]:
    """Within, Ray's servers start in a process group of their own. What `timeout`, or a batch system, sends to the
    driver's group leaves them alone then, and a driver that ends in order still has them; without them Ray's own
    shutdown waits for seconds."""
    tie = ray._private.utils.set_kill_on_parent_death_linux  # called in the child before its exec

    def leave_group_and_tie() -> None:
        os.setpgrp()
        tie()

    ray._private.utils.set_kill_on_parent_death_linux = leave_group_and_tie
    try:
        yield
    finally:
        ray._private.utils.set_kill_on_parent_death_linux = tie


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    host, colon, port = address.rpartition(":")
    if address != "auto" and not (host and colon and port.isdigit() and "/" not in host):
        raise UserError(f"--ray-address {address}: write host:port, or auto")
    try:
        if address != "auto":  # Ray itself tries for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--ray-address {address}: no Ray cluster answers there ({reason}); one that was started with a token is "
            "joined with RAY_AUTH_MODE=token in the environment"
        ) from error


def stop() -> None:
    """Leave the cluster; one of our own ends with it."""
    ray.shutdown()
    shutil.rmtree(_session_folder(), ignore_errors=True)


def _write_messages(log: Path, data: Mapping[str, Any], ignore_prefix: bool) -> None:
    with log.open("a") as file:
        file.writelines(f"{line}\n" for line in data["lines"])


@contextmanager
def _servers_alone() -> Iterator[None]:
    """Within, ray.init leaves out three processes that nobody asks for here: 270 MB of resident memory, and seconds of
    start-up during which Ray's agents, which have 15 s to come up, share the processors with them."""
    node: Any = ray._private.node.Node
    helpers = {name: getattr(node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")}
    for name in helpers:
        setattr(node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in helpers.items():
            setattr(node, name, start)


def _session_folder() -> Path:
    """A short path (the names of Unix sockets in it may not exceed 107 bytes), private to this process."""
    root = Path(tempfile.gettempdir())
    return (root if len(str(root)) <= 20 else Path("/tmp")) / f"longstride-{os.getpid()}"


def _sweep(root: Path) -> None:
    """Remove what drivers that were killed left in `root`: their folders, and two agents that outlive them.

    The agents try for a minute to tell the dead cluster of its death, with 190 MB of resident memory.
    """
    for folder in root.glob("longstride-*"):
        pid = folder.name.removeprefix("longstride-")
        if not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        for process in psutil.process_iter(["name"]):
            if process.info["name"] not in {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}:
                continue
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)
