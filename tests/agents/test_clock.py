"""The clock of the three training loops."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agents import evaluation
from agents.clock import Clock
from launch import jobs
from tests.agents.runs import runtime


def test_rates_count_from_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    learner, workers = SimpleNamespace(env_steps=100, gradient_steps=7), SimpleNamespace(restarts=3)
    clock = Clock(learner, workers, "env_steps", "gradient_steps")  # type: ignore[arg-type]
    with clock.waiting():
        now = 13.0
    now, learner.env_steps, learner.gradient_steps = 14.0, 300, 27
    expected = {"time/env_steps_per_s": 50, "time/gradient_steps_per_s": 5}
    expected |= {"time/waited_for_workers": 0.75, "run/actor_restarts": 3}
    assert clock.rates() == clock.rates() == expected
    clock.restart()
    now, learner.env_steps = 15.0, 310
    assert clock.rates()["time/env_steps_per_s"] == 10
    assert clock.rates()["time/waited_for_workers"] == 0


@pytest.mark.parametrize("job", ["a2c", "offpac", "ddpg"])
def test_evaluating_and_saving_are_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    """Time passes in them alone, an hour in each, beside a millisecond for each look at the clock."""
    now, play_episodes = 0.0, evaluation.play_episodes

    def look() -> float:
        nonlocal now
        now += 1e-3
        return now

    def an_hour(*args: Any) -> Any:
        nonlocal now
        now += 3600
        return play_episodes(*args)

    run = runtime(tmp_path, "run")
    save, log, rates = run.save, run.log, []

    def slowly(*args: Any, **options: Any) -> None:
        nonlocal now
        now += 3600
        save(*args, **options)

    def watched(step: int, metrics: Any, total: int | None = None) -> None:
        rates.append(metrics["time/env_steps_per_s"])
        log(step, metrics, total)

    monkeypatch.setattr(time, "perf_counter", look)
    monkeypatch.setattr(evaluation, "play_episodes", an_hour)
    monkeypatch.setattr(run, "save", slowly)
    monkeypatch.setattr(run, "log", watched)
    sizes: dict[str, Any] = {"steps": 600, "eval_every": 200, "log_every": 100, "eval_episodes": 1, "workers": 1}
    config = jobs.find(job).config_class()(**sizes, **({"learning_starts": 100} if job == "ddpg" else {}))
    jobs.find(job).trainer()(config, run)
    run.close()
    assert len(rates) >= 3
    assert min(rates) > 1000
