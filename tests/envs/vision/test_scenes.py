from dataclasses import replace

import numpy as np
import pytest

from envs.vision.scene_spec import (
    CATEGORIES,
    COLOURS,
    KINDS,
    PATTERNS,
    PLACES,
    STUFF,
    ObjectSpec,
    SceneSpec,
    parse_caption,
    sample_spec,
)
from envs.vision.scenes import Scene, SceneConfig, captioned_images, make_scene, render, scene_caption
from models.errors import UserError

CONFIG = SceneConfig()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(CONFIG, seed=0, index=i) for i in range(60)]


def test_the_same_seed_and_number_make_the_same_scene(scenes: list[Scene]) -> None:
    again = make_scene(CONFIG, 0, 17)
    assert np.array_equal(again.image, scenes[17].image)
    assert again.spec == scenes[17].spec
    assert not np.array_equal(make_scene(CONFIG, 1, 17).image, again.image)
    assert not np.array_equal(make_scene(CONFIG, 0, 17, "heldout").image, again.image)


def test_a_scene_is_pinned() -> None:
    """Whoever changes the renderer changes every score measured on scenes: make sure that it is on purpose."""
    scene = make_scene(CONFIG, seed=0, index=2)
    assert scene.caption == (
        "a small dotted green circle at the bottom right, a small dotted red circle at the bottom "
        "and a blue handwritten 1 on the right, on a noisy brown background"
    )
    assert scene.boxes.tolist() == [[95.0, 83.0, 121.0, 109.0], [59.0, 85.0, 86.0, 112.0], [87.0, 43.0, 116.0, 84.0]]


def test_boxes_and_masks_are_of_what_is_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.masks.sum(0).max(initial=0) <= 1
        for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes.astype(int)):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
            assert len(rows) >= 20
        assert scene.labels.tolist() == [KINDS.index(thing.kind) for thing in scene.spec.objects]


def test_objects_are_where_and_what_the_specification_says() -> None:
    """Each kind, colour and place alone: the centre of its pixels in its cell, their mean near its colour."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for place, colour in zip(range(9), [*COLOURS, "red"]):
            spec = SceneSpec((ObjectSpec(kind, colour, "small", "solid", place),))
            scene = render(spec, rng, CONFIG)
            x0, y0, x1, y1 = scene.boxes[0]
            cell = int((y0 + y1) / 2 / (CONFIG.size / 3)) * 3 + int((x0 + x1) / 2 / (CONFIG.size / 3))
            assert cell == place
            inside = scene.image[scene.masks[0]].astype(float)
            distances = {name: np.abs(np.median(inside, 0) - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distances, key=lambda name: distances[name]) == colour


def test_sizes_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    heights: dict[str, list[float]] = {}
    for size in ("small", "medium", "large"):
        for _ in range(30):
            scene = render(SceneSpec((ObjectSpec("ring", "red", size),)), rng, CONFIG)
            heights.setdefault(size, []).append(scene.boxes[0, 3] - scene.boxes[0, 1])
    assert max(heights["small"]) < min(heights["medium"])
    assert max(heights["medium"]) < min(heights["large"])


def test_most_of_each_object_stays_visible() -> None:
    """Against the same object alone; small objects lie on top of large ones."""
    shares = []
    for index in range(60):
        scene = make_scene(replace(CONFIG, min_objects=5), 0, index)
        for i, thing in enumerate(scene.spec.objects):
            _, y0, _, y1 = scene.boxes[i]
            typical = {"small": 25, "medium": 37, "large": 57}[thing.size]
            shares.append((y1 - y0) / typical)
    assert np.quantile(shares, 0.02) > 0.4


def test_captions_and_specifications_are_one_to_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        spec = sample_spec(rng, 0, 12)
        assert parse_caption(spec.caption()) == spec
    one = SceneSpec((ObjectSpec("star", "orange", place=PLACES.index("at the top")),))
    assert one.caption() == "an orange star at the top, on a plain black background"


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "does not end in a background"),
        ("a red circle in the centre", "does not end in a background"),
        ("a red hexagon in the centre, on a plain black background", "'a red hexagon in the centre'"),
        ("a red circle, on a plain black background", "not an object with a place"),
        (", on a plain black background", "names no object"),
    ],
)
def test_captions_outside_the_grammar(caption: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_caption(caption)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "hexagon", "colour": "red"}, "kind 'hexagon'"),
        ({"kind": "ring", "colour": "grey"}, "colour 'grey'"),
        ({"kind": "7", "colour": "red", "texture": "striped"}, "handwritten 7 is solid"),
        ({"kind": "ring", "colour": "red", "place": 9}, "place 9"),
    ],
)
def test_specifications_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectSpec(**fields)


def test_everything_is_drawn_about_equally_often() -> None:
    rng = np.random.default_rng(0)
    kinds = [thing.kind for _ in range(2000) for thing in sample_spec(rng, 1, 5).objects]
    counts = np.unique(kinds, return_counts=True)[1]
    assert len(counts) == len(KINDS)
    assert counts.max() / counts.min() < 1.3


def test_large_scenes_with_objects_of_the_same_pixels() -> None:
    scene = make_scene(SceneConfig(size=512, min_objects=12, max_objects=12, object_scale=0.25), 0, 0)
    sides = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(1)
    assert scene.image.shape == (512, 512, 3)
    assert ((sides > 10) & (sides < 68)).all()


def test_heldout_handwriting_is_other_handwriting() -> None:
    from envs.vision.shapes import handwriting

    train, heldout = handwriting("3", False), handwriting("3", True)
    assert len(train) + len(heldout) == 183  # of load_digits
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in heldout}


def test_captioned_images() -> None:
    stream = captioned_images(CONFIG, seed=0, first=5)
    image, caption = next(stream)
    assert np.array_equal(image, make_scene(CONFIG, 0, 5).image)
    assert caption == make_scene(CONFIG, 0, 5).caption
    assert next(stream)[1] == make_scene(CONFIG, 0, 6).caption


def test_empty_scenes() -> None:
    scene = make_scene(SceneConfig(min_objects=0, max_objects=0), 0, 0)
    assert scene.boxes.shape == (0, 4)
    assert scene.masks.shape == (0, 128, 128)
    assert scene.caption.endswith("background")


def test_categories() -> None:
    assert len(CATEGORIES) == len(KINDS) + len(PATTERNS)
    assert {CATEGORIES[i] for i in STUFF} == {f"{pattern} background" for pattern in PATTERNS}
    with pytest.raises(UserError, match="min_objects 3 and max_objects 2"):
        SceneConfig(min_objects=3, max_objects=2)


def test_a_caption_can_be_had_without_its_picture() -> None:
    for split in ("train", "heldout"):
        assert scene_caption(SceneConfig(), 3, 7, split) == make_scene(SceneConfig(), 3, 7, split).caption
