from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import envs.vision
from envs.control.spaces import DiscreteActions
from envs.control.vector_env import ControlEnv
from envs.vision import detect
from envs.vision.box_quality import box_quality
from envs.vision.detect import EYE_VARIABLE, LEVELS, SCENES, STOP, WINDOWS, DetectVectorEnv
from envs.vision.scene_spec import CATEGORIES, COLOURS, SHAPES, ObjectSpec, SceneSpec
from envs.vision.scenes import Scene, render
from models.detr.checkpoint import save_detr
from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import Detr
from models.detr.postprocess import Detections
from models.errors import UserError

COLOUR_OF = dict(zip(SHAPES, COLOURS))  # in these tests a shape's colour tells what it is
CLOSE_UPS = range(5, STOP)


def colourful_scene(*_: Any) -> Scene:
    places = (0, 2, 4, 6, 8)
    objects = tuple(ObjectSpec(kind, COLOUR_OF[kind], "large", "solid", p) for kind, p in zip(SHAPES, places))
    return render(SceneSpec(objects), np.random.default_rng(0), SCENES)


def eye_for_colours(images_BHWC: torch.Tensor) -> list[Detections]:
    """Finds the tests' shapes by their colour, exactly, if they show at least 8 pixels."""
    found = []
    for image in images_BHWC.numpy().astype(int):
        boxes, labels = [], []
        for label, kind in enumerate(SHAPES[:5]):
            near = np.abs(image - np.array(COLOURS[COLOUR_OF[kind]])).max(-1) < 30
            rows, columns = np.nonzero(near)
            if len(rows) >= 8:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        n = len(labels)
        found.append(
            Detections(
                torch.full((n,), 0.9),
                torch.tensor(labels, dtype=torch.long),
                torch.tensor(boxes, dtype=torch.float32).view(n, 4),
                torch.arange(n),
            )
        )
    return found


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> DetectVectorEnv:
    monkeypatch.setattr(detect, "make_scene", colourful_scene)
    env = DetectVectorEnv(2, eye=eye_for_colours, cost=0.02)
    env.reset(seed=0)
    return env


def test_windows_cover_the_scene() -> None:
    for level, (n, side) in enumerate(LEVELS):
        first = sum(m * m for m, _ in LEVELS[:level])
        covered = np.zeros((SCENES.size, SCENES.size), bool)
        for x, y, s in WINDOWS[first : first + n * n]:
            assert s == side
            covered[y : y + s, x : x + s] = True
        assert covered.all()


def test_looking_closely_everywhere_finds_everything(env: DetectVectorEnv) -> None:
    """The return is the final quality minus the cost of the looks."""
    env.max_looks = 100
    total = np.zeros(2)
    for window in CLOSE_UPS:
        _, rewards, terminated, truncated, info = env.step([window, window])
        total += rewards
        assert not terminated.any()
        assert not truncated.any()
    assert (info["quality"] > 0.85).all()
    np.testing.assert_allclose(total, info["quality"] - 0.02 * 16, atol=1e-5)
    _, rewards, terminated, _, _ = env.step([STOP, STOP])
    assert rewards.tolist() == [0, 0]
    assert terminated.all()


def test_seeing_the_same_twice_costs_and_pays_nothing(env: DetectVectorEnv) -> None:
    env.step([0, 0])
    _, rewards, _, _, _ = env.step([0, 0])
    np.testing.assert_allclose(rewards, -0.02, atol=1e-6)


def test_each_environment_is_on_its_own(env: DetectVectorEnv) -> None:
    before, _ = env.reset(seed=1)
    after, rewards, terminated, _, info = env.step([7, STOP])
    assert np.array_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0])
    assert terminated.tolist() == [False, True]
    assert info["looks"].tolist() == [1, 0]
    after, rewards, terminated, _, info = env.step([8, 8])  # of the second: the dummy step of autoreset
    assert rewards[1] == 0
    assert not terminated[1]
    assert info["looks"].tolist() == [2, 0]


def test_what_the_observation_says(env: DetectVectorEnv) -> None:
    """At the lower left and the lower right lies one object each, whole in a close-up."""
    observations, _ = env.reset(seed=0)
    looked, standing_out, found, most, left = np.split(observations[0], [STOP, 2 * STOP, 3 * STOP, 3 * STOP + 3])
    assert not looked.any()
    assert not found.any()
    assert left == 1
    x, y, salience = most
    assert salience == standing_out[0] == standing_out.max() > 0.2
    at = np.array([x + 1, y + 1]) / 2 * SCENES.size
    boxes = env.episodes[0].scene.boxes
    assert ((boxes[:, :2] - 32 < at) & (at < boxes[:, 2:] + 32)).all(1).any()  # a cell has 32 pixels

    corner, across = CLOSE_UPS[12], CLOSE_UPS[15]
    after = env.step([corner, STOP])[0][0]
    looked, standing_out_after, found, most, left = np.split(after, [STOP, 2 * STOP, 3 * STOP, 3 * STOP + 3])
    assert np.flatnonzero(looked).tolist() == [corner]
    assert standing_out[corner] > 0.2
    assert standing_out_after[corner] == 0
    assert standing_out_after[across] == standing_out[across] > 0.2
    assert np.flatnonzero(found).tolist() == [0, 3, corner]  # the scene, its quarter, and this
    assert found[corner] == 1 / 4
    assert left == pytest.approx(11 / 12)


def test_a_look_from_afar_leaves_more_to_look_at(env: DetectVectorEnv) -> None:
    """1 - 160/512 of what stands out is left after a look at the whole scene, 1 - 160/288 after one at a quarter."""
    before = env.reset(seed=0)[0][:, STOP : 2 * STOP]
    after = env.step([0, 3])[0][:, STOP : 2 * STOP]
    corner, across = CLOSE_UPS[12], CLOSE_UPS[15]
    np.testing.assert_allclose(after[0], before[0] * (1 - 160 / 512), rtol=1e-5)
    np.testing.assert_allclose(after[1, corner], before[1, corner] * (1 - 160 / 288), rtol=1e-5)
    assert after[1, across] == before[1, across] > 0.2


def test_looks_are_limited(env: DetectVectorEnv) -> None:
    env.max_looks = 3
    ended = [env.step([w, STOP])[2][0] for w in (5, 6, 7)]
    assert ended == [False, False, True]


def test_the_vector_matches_gymnasiums_spaces_and_the_seed_decides(env: DetectVectorEnv) -> None:
    observations, _ = env.reset(seed=5)
    assert observations in env.observation_space
    first = [env.step([3, 9])[0] for _ in range(3)]
    env.reset(seed=5)
    again = [env.step([3, 9])[0] for _ in range(3)]
    assert np.array_equal(first, again)


def test_scenes_differ_by_seed_environment_and_episode() -> None:
    env = DetectVectorEnv(2, eye=eye_for_colours)
    env.reset(seed=0)
    captions = {e.scene.caption for e in env.episodes}
    env.step([STOP, STOP])
    env.step([0, 0])
    captions |= {e.scene.caption for e in env.episodes}
    env.reset(seed=1)
    captions |= {e.scene.caption for e in env.episodes}
    assert len(captions) == 6
    env.reset(seed=0)
    assert {e.scene.caption for e in env.episodes} < captions


def test_continuous_actions_name_the_same_windows() -> None:
    env = DetectVectorEnv(1, eye=eye_for_colours, continuous=True)
    env.reset(seed=0)
    episode, seen = env.episodes[0], set()
    for level, (n, _) in enumerate(LEVELS):
        zoom = (level + 0.5) / len(LEVELS) * 2 - 1
        for row in range(n):
            for column in range(n):
                x, y = ((v + 0.5) / n * 2 - 1 for v in (column, row))
                seen.add(env._choice([x, y, zoom, -1], episode))
    assert seen == set(range(STOP))
    assert env._choice([0, 0, 0, 0.6], episode) == STOP
    assert env._choice([0, 0, 0, 0.4], episode) != STOP
    assert env._choice([9, 9, 9, -9], episode) == STOP - 1  # clipped


def test_continuous_actions_pass_over_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "make_scene", colourful_scene)
    env = DetectVectorEnv(1, eye=eye_for_colours, continuous=True, max_looks=5)
    env.reset(seed=0)
    at_the_top_left = np.array([[-0.8, -0.9, 0.0, -1.0]], np.float32)
    for expected in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]):
        env.step(at_the_top_left)
        assert np.flatnonzero(env.episodes[0].looked).tolist() == expected


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    config = DetrConfig(
        num_labels=21,
        labels=CATEGORIES,
        num_queries=6,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        backbone=ResNetConfig("basic", (1, 1, 1), (8, 16, 16), 8),
    )
    torch.manual_seed(0)
    save_detr(Detr(config), folder)
    return folder


def test_gymnasium_makes_it_with_a_detector_of_ours(detector: Path) -> None:
    assert envs.vision
    env = gymnasium.make("Detect-v0", eye=detector)
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    _, reward, _, _, info = env.step(np.int64(2))
    assert reward == pytest.approx(info["quality"] - 0.02)
    vector = gymnasium.make_vec("DetectContinuous-v0", num_envs=3, eye=detector)
    vector.reset(seed=0)
    assert vector.step(vector.action_space.sample())[0].shape == (3, 3 * 21 + 4)


def test_agents_take_it_by_its_id(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EYE_VARIABLE, str(detector))
    env = ControlEnv("envs.vision:Detect-v0", 2)
    assert env.spaces.actions == DiscreteActions(STOP + 1)
    env.close()


def test_bad_input(tmp_path: Path, env: DetectVectorEnv) -> None:
    with pytest.raises(UserError, match="no model there; train one"):
        DetectVectorEnv(1, eye=tmp_path / "nowhere")
    with pytest.raises(UserError, match="action 22 is not one of 0 to 21"):
        env.step([22, 0])
    with pytest.raises(UserError, match="max_looks 0"):
        DetectVectorEnv(1, eye=eye_for_colours, max_looks=0)


def quality(answer: list[list[float]], labels: list[int], truth: list[list[float]], true_labels: list[int]) -> float:
    return box_quality(
        np.array(answer).reshape(-1, 4), np.array(labels), np.array(truth).reshape(-1, 4), np.array(true_labels)
    )


def test_box_quality_by_hand() -> None:
    a, b = [0.0, 0, 10, 10], [20.0, 20, 30, 30]
    assert quality([a, b], [0, 1], [b, a], [1, 0]) == 1
    assert quality([], [], [], []) == 1
    assert quality([], [], [a], [0]) == quality([a], [0], [], []) == quality([a], [1], [a], [0]) == 0
    assert quality([a], [0], [a, b], [0, 0]) == pytest.approx(1 / 1.5)
    assert quality([a, b], [0, 0], [a], [0]) == pytest.approx(1 / 1.5)
    assert quality([[0, 0, 10, 8]], [0], [a], [0]) == pytest.approx(0.8)
    assert quality([[0, 0, 10, 5]], [0], [a], [0]) == 0  # an IoU of 1/2 is no match
    # One answer overlaps two objects: the assignment of the greatest sum counts.
    assert quality([[0, 0, 10, 9], [0, 0, 10, 10]], [0, 0], [a, [0, 0, 10, 8]], [0, 0]) == pytest.approx(
        (1 + 8 / 9) / 2
    )
