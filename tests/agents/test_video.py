import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agents.a2c import A2CConfig
from agents.video import animated_gif, film_episode
from launch import jobs
from models.errors import UserError
from tests.agents.runs import runtime, train
from tests.agents.test_rollout import worker
from tests.envs.control.environments import Counting

DRAWN = "tests.agents.test_video:Drawn"


class Drawn(Counting):
    """Paints its count."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.full((20, 30, 3), 40 * self.steps, np.uint8)


def test_a_film_shows_every_step_of_one_episode() -> None:
    actor, snapshot = worker(DRAWN)
    *waits, file = film_episode(actor.config, snapshot, seed=0, slice_s=1e-9)
    assert waits == [None] * 4  # a slice is at least a step, and the episode has five
    film = Image.open(io.BytesIO(file or b""))
    assert (film.n_frames, film.size, film.info["duration"]) == (6, (30, 20), 100)  # type: ignore[attr-defined]
    film.seek(5)
    assert abs(film.convert("RGB").getpixel((3, 3))[0] - 200) < 5  # type: ignore[index]


def test_fast_and_large_films_are_thinned() -> None:
    frames = [np.full((900, 600, 3), i, np.uint8) for i in range(100)]
    film = Image.open(io.BytesIO(animated_gif(frames, frames_per_s=100)))
    assert (film.n_frames, film.size, film.info["duration"]) == (25, (267, 400), 40)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("tests.envs.control.environments:Counting-v0", "cannot be made|draws no pictures"),
        ("envpool:CartPole-v1", "envpool draws no pictures; give --env CartPole-v1"),
    ],
)
def test_what_cannot_be_filmed(env_id: str, message: str) -> None:
    actor, snapshot = worker()
    with pytest.raises(UserError, match=message):
        next(film_episode(replace(actor.config, env=env_id), snapshot, seed=0, slice_s=60))


def test_evaluate_films(tmp_path: Path) -> None:
    config = A2CConfig(env=DRAWN, steps=500, eval_every=500, eval_episodes=2)
    train("a2c", config, tmp_path, "run")
    run = runtime(tmp_path, "run", resume=True)
    evaluate = jobs.find("a2c").evaluator()
    assert evaluate is not None
    evaluate(replace(config, videos=2), run)
    run.close()
    assert len(list((tmp_path / "run" / "rollouts").glob("*.gif"))) == 2
