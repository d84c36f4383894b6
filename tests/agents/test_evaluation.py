from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import evaluation
from agents.evaluation import Evaluation
from launch import jobs
from launch.run_directory import RunDirectory
from models.errors import UserError
from tests.agents.runs import assert_equal, final_state, metrics, runtime, train


def test_metrics() -> None:
    found = Evaluation(np.array([1.0, 3.0]), np.array([10, 20])).metrics("eval/sampled")
    assert found["eval/sampled/return_mean"] == 2
    assert found["eval/sampled/return_std"] == 1
    assert found["eval/sampled/length_mean"] == 15
    assert (found["eval/sampled/return_ci95_low"], found["eval/sampled/return_ci95_high"]) == (1, 3)


@pytest.mark.parametrize("job", ["a2c", "offpac", "ddpg"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_was_learnt_before_an_evaluation_that_fails_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, failing: int
) -> None:
    """And a resumed run begins with that evaluation: it ends as one in which all succeeded, line by line."""
    sizes: dict[str, Any] = {"steps": 900, "eval_every": 300, "log_every": 100, "eval_episodes": 1, "workers": 1}
    sizes |= {"learning_starts": 100, "updates_per_step": 0.1} if job == "ddpg" else {"n_steps": 4}
    config = jobs.find(job).config_class()(**sizes)
    train(job, config, tmp_path, "whole")

    calls, play_episodes = 0, evaluation.play_episodes

    def failing_once(*args: Any) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise UserError("hung")
        return play_episodes(*args)

    monkeypatch.setattr(evaluation, "play_episodes", failing_once)
    with pytest.raises(UserError, match="hung"):
        train(job, config, tmp_path, "cut")
    saved = final_state(tmp_path, "cut")
    assert saved["env_steps"] >= 300 * (failing + 1)
    summary = RunDirectory(tmp_path / "cut").read_summary()
    assert summary["steps"] == summary["checkpoint"] == saved["env_steps"]
    train(job, config, tmp_path, "cut", resume=True)
    states = [final_state(tmp_path, name) for name in ("cut", "whole")]
    for state in states:
        state.get("replay", {}).pop("saves", None)  # there was one more
    assert_equal(*states)
    assert metrics(tmp_path, "cut") == metrics(tmp_path, "whole")
    run = runtime(tmp_path, "cut", resume=True)
    assert run._store.newest().score == metrics(tmp_path, "whole")[-1]["eval/return_mean"]  # type: ignore[union-attr]
    run.close()
