from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.vision.agreement import agreement, colours_of
from envs.vision.scene_spec import COLOURS, ObjectSpec, SceneSpec
from envs.vision.scenes import Scene, SceneConfig, make_scene, render
from models.detr.postprocess import Detections


def truth(scene: Scene) -> Detections:
    n = len(scene.labels)
    return Detections(torch.ones(n), torch.from_numpy(scene.labels), torch.from_numpy(scene.boxes), torch.arange(n))


def test_a_scene_agrees_with_its_own_specification_and_little_with_others() -> None:
    scenes = [make_scene(SceneConfig(min_objects=2, max_objects=4), 0, i) for i in range(80)]
    own = [agreement(s.spec, truth(s), s.image) for s in scenes]
    others = [agreement(scenes[i - 1].spec, truth(s), s.image) for i, s in enumerate(scenes)]
    assert np.mean(own) > 0.97
    assert np.mean(others) < 0.02


def test_what_is_asked_has_to_be_there() -> None:
    asked = ObjectSpec("star", "red", place=8)
    scene = render(SceneSpec((asked,)), np.random.default_rng(0), SceneConfig())
    found = truth(scene)
    assert agreement(SceneSpec((asked,)), found, scene.image) == 1
    for change in ({"kind": "ring"}, {"colour": "blue"}, {"place": 0}):
        assert agreement(SceneSpec((replace(asked, **change),)), found, scene.image) == 0
    # One star answers for one of two; size and texture are not checked.
    assert agreement(SceneSpec((asked, replace(asked, size="large"))), found, scene.image) == 0.5
    nothing = Detections(torch.ones(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.arange(0))
    assert agreement(SceneSpec((asked,)), nothing, scene.image) == 0
    assert agreement(SceneSpec(()), nothing, scene.image) == 1


@pytest.mark.parametrize("texture", ["solid", "striped", "dotted"])
@pytest.mark.parametrize("pattern", ["plain", "noisy", "graded"])
def test_colours_are_seen_whatever_the_texture_and_the_background(texture: str, pattern: str) -> None:
    rng = np.random.default_rng(0)
    right = wrong = 0
    for colour in COLOURS:
        for background in ("black", "grey", "brown", "navy"):
            spec = SceneSpec((ObjectSpec("circle", colour, "medium", texture),), pattern, background)
            scene = render(spec, rng, SceneConfig())
            seen = colours_of(scene.image, scene.boxes[0])
            right += colour in seen
            wrong += len(seen - {colour})
    assert right == 32
    assert wrong <= 8  # dark stripes of one colour may look like another
