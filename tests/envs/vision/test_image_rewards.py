import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.vision import shipped_weights
from envs.vision.image_rewards import RewardScorer, find_reward
from envs.vision.scenes import SceneConfig, make_scene, scene_caption
from models.errors import UserError


def test_jpeg_size_in_kilobytes() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([np.full((64, 64, 3), 90, np.uint8), rng.integers(0, 256, (64, 64, 3), np.uint8)])
    plain, noise = RewardScorer("jpeg-incompressibility").score(images, ["a", "b"])
    file = io.BytesIO()
    Image.fromarray(images[1]).save(file, format="JPEG", quality=95)
    assert noise == len(file.getvalue()) / 1000
    assert 0 < plain < noise
    assert RewardScorer("jpeg-compressibility").score(images, ["a", "b"]).tolist() == [-plain, -noise]


def test_agreement_is_judged_by_the_detector_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SceneConfig(size=128, max_objects=2)
    images = np.stack([make_scene(config, 0, i, "heldout").image for i in range(4)])
    captions = [scene_caption(config, 0, i, "heldout") for i in range(4)]
    assert np.mean(find_reward("scene-agreement")(images, captions)) >= 0.75
    monkeypatch.setattr(shipped_weights, "WEIGHTS", tmp_path)  # of an installation without any
    with pytest.raises(UserError, match=r"no detr model .*--detector"):
        find_reward("scene-agreement")


def test_unknown_rewards_are_named() -> None:
    with pytest.raises(UserError, match="did you mean `jpeg-compressibility`"):
        find_reward("jpeg-compressability")
    with pytest.raises(UserError, match="cannot be imported"):
        find_reward("no.such.module:reward")
