from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import jobs
from launch.config import RunConfig
from launch.ray_backend import RayBackend
from tests.launch import demo_job


@pytest.fixture(scope="session")
def announcements() -> list[str]:
    """What the backend told the console so far."""
    return []


@pytest.fixture(scope="session")
def ray_backend(tmp_path_factory: pytest.TempPathFactory, announcements: list[str]) -> Iterator[RayBackend]:
    """One cluster for all tests; each test closes its own groups."""
    backend = RayBackend(RunConfig(), tmp_path_factory.mktemp("logs"), announcements.append)
    yield backend
    backend.close()


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command line knows the job `demo`."""
    monkeypatch.setitem(jobs.JOBS, "demo", demo_job.JOB)
    return Path(demo_job.__file__)
