import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from envs.vision import shipped_weights
from envs.vision.answer_reward import AnswerScorer
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


@pytest.mark.parametrize(("text", "message"), [("1 / 0", "ZeroDivisionError"), ("def f(:", "SyntaxError"),
                                               ("import sys; sys.exit(3)", "SystemExit: 3")])  # fmt: skip
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    name = f"broken_{message[:6]}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for read in (find_reward, lambda path: AnswerScorer(path, [])):
        with pytest.raises(UserError, match=f"{name}:f: its module cannot be imported .{message}"):
            read(f"{name}:f")


def test_what_is_not_a_function_pays_nothing() -> None:
    for read in (find_reward, lambda path: AnswerScorer(path, [])):
        with pytest.raises(UserError, match="math:pi: is a float, not a function"):
            read("math:pi")


def test_unknown_rewards_are_named() -> None:
    with pytest.raises(UserError, match="did you mean `jpeg-compressibility`"):
        find_reward("jpeg-compressability")
    with pytest.raises(UserError, match="cannot be imported"):
        find_reward("no.such.module:reward")
