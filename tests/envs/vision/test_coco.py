import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from envs.vision.captioned import CaptionedCoco
from envs.vision.coco import CocoConfig, CocoFolder
from envs.vision.coco_eval import average_precision, detection_records
from envs.vision.coco_format import write_scenes
from envs.vision.example import Example, collate
from envs.vision.panoptic_quality import PanopticQuality
from envs.vision.scene_spec import CATEGORIES, KINDS, STUFF
from envs.vision.scenes import SceneConfig, make_scene
from envs.vision.sources import BatchLoader, CocoSource, DataConfig
from envs.vision.transforms import ResizeConfig
from models.detr.boxes import cxcywh_to_xyxy
from models.detr.postprocess import Detections
from models.errors import UserError

SCENES = SceneConfig(size=64, max_objects=3)
COUNT = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path, SCENES, seed=0, count=COUNT)
    return tmp_path


def config(folder: Path, **changes: Any) -> CocoConfig:
    return replace(CocoConfig(folder, "train"), **changes)


def test_written_scenes_read_back(folder: Path) -> None:
    instances, panoptic = CocoFolder(config(folder)), CocoFolder(config(folder, panoptic=True))
    assert instances.names == KINDS
    assert panoptic.names == CATEGORIES
    assert panoptic.stuff == STUFF
    assert len(instances) == len(panoptic) == COUNT
    for i in range(COUNT):
        scene = make_scene(SCENES, 0, i)
        found = instances.example(i)
        assert np.array_equal(found.image, scene.image)
        assert np.array_equal(found.labels, scene.labels)
        assert np.array_equal(found.boxes, scene.boxes)
        assert found.ids is not None
        assert np.array_equal(found.ids, scene.ids)
        assert instances.records[i].captions == [scene.caption]
        whole = panoptic.example(i)
        assert whole.labels.tolist() == [scene.spec.background_label, *scene.labels]
        assert whole.ids is not None
        assert np.array_equal(whole.ids, scene.ids + 1)


def test_pycocotools_reads_what_we_write(folder: Path) -> None:
    coco = COCO(str(folder / "annotations" / "instances_train.json"))
    scene = make_scene(SCENES, 0, 3)
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[3]))
    assert [coco.loadCats(a["category_id"])[0]["name"] for a in annotations] == [o.kind for o in scene.spec.objects]
    for annotation, mask in zip(annotations, scene.masks):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)


def test_polygons_and_overlaps(folder: Path) -> None:
    """Of two masks that overlap the smaller one keeps its pixels; a crowd is left out."""
    file = folder / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())

    records = [("small", square(10, 20), 0), ("large", square(4, 40), 0), ("crowd", square(0, 60), 1)]
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": [p[0], p[1], p[2] - p[0], p[2] - p[0]], "iscrowd": crowd,
         "area": 1, "segmentation": [p]}
        for i, (_, p, crowd) in enumerate(records)
    ]  # fmt: skip
    file.write_text(json.dumps(content))
    found = CocoFolder(config(folder)).example(0)
    assert found.boxes.tolist() == [[10, 10, 20, 20], [4, 4, 40, 40]]
    assert found.ids is not None
    assert np.bincount(found.ids.ravel()).tolist() == [64 * 64 - 36 * 36, 100, 36 * 36 - 100]


def change_json(folder: Path, kind: str, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "annotations" / f"{kind}_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "change", "message", "examples", "objects_left_out"),
    [
        (
            "instances",
            lambda c: c["images"][1].update(file_name="gone.png"),
            r"image 1: .*gone.png is missing",
            4,
            None,
        ),
        (
            "instances",
            lambda c: c["images"][1].pop("height"),
            r"image 1 cannot be used \(KeyError: 'height'\)",
            4,
            None,
        ),
        (
            "instances",
            lambda c: c["annotations"][0].update(bbox=[60, 5, 30, 5]),
            "lies outside its image of 64×64",
            5,
            1,
        ),
        ("instances", lambda c: c["annotations"][0].update(bbox=[-9, 5, 30, 5]), "lies outside", 5, 1),
        ("instances", lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 9]), r"box \[5, 5, 0, 9\] has no area", 5, 1),
        ("instances", lambda c: c["annotations"][0].update(bbox=[5, 5, 9]), "annotation 1 cannot be used", 5, 1),
        ("instances", lambda c: c["annotations"][0].update(category_id=99), "category 99 is not among", 5, 1),
        ("instances", lambda c: c["annotations"][0].pop("bbox"), "annotation 1 cannot be used", 5, 1),
        ("instances", lambda c: c["annotations"][0].update(bbox=[float("nan"), 5, 9, 9]), "is not finite", 5, 1),
        ("instances", lambda c: c["annotations"][0].update(area="much"), "annotation 1 cannot be used", 5, 1),
        ("instances", lambda c: c["annotations"].append(7), "annotation 7 cannot be used", 5, 0),
        ("instances", lambda c: c["annotations"][0].update(image_id=[0]), "annotation 1 cannot be used", 5, 1),
        ("instances", lambda c: c["images"][1].update(id=[1]), "image .*cannot be used", 4, None),
        ("instances", lambda c: c["images"].append(None), "image None cannot be used", 5, 0),
        ("instances", lambda c: c["categories"].append({"id": 99}), "category 99 cannot be used", 5, 0),
        ("instances", lambda c: c["categories"].append({"name": "x"}), r"category .*KeyError: 'id'", 5, 0),
        ("instances", lambda c: c["categories"].append({"id": 1, "name": "x"}), "1 is circle already", 5, 0),
        ("captions", lambda c: c["annotations"][2].update(caption="  "), "caption 3 of image 2 is empty", 5, 0),
        (
            "captions",
            lambda c: c["annotations"][2].pop("image_id"),
            r"captions_train\.json: caption 3 cannot be used",
            5,
            0,
        ),
    ],
)
def test_bad_records_are_named_then_refused_or_left_out(
    folder: Path, kind: str, change: Any, message: str, examples: int, objects_left_out: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    before = sum(len(r.labels) for r in CocoFolder(config(folder)).records)
    change_json(folder, kind, change)
    with pytest.raises(UserError, match=message):
        CocoFolder(config(folder))
    skipping = CocoFolder(config(folder, on_bad="skip"))
    assert len(skipping.problems) == 1
    assert re.search(message, caplog.text)
    assert "1 records left out: " in caplog.text
    assert len(skipping) == examples
    if objects_left_out is not None:
        assert before - sum(len(r.labels) for r in skipping.records) == objects_left_out


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (lambda a: a["segments_info"][1].pop("category_id"), r"image 0, segment 2 cannot be used"),
        (lambda a: a["segments_info"][1].update(bbox=[1, 2, float("inf"), 4]), "image 0, segment 2: .* is not finite"),
    ],
)
def test_a_bad_segment_is_left_out_alone(folder: Path, segment: Any, message: str) -> None:
    before = CocoFolder(config(folder, panoptic=True)).records[0].labels
    change_json(folder, "panoptic", lambda c: segment(c["annotations"][0]))
    with pytest.raises(UserError, match=message):
        CocoFolder(config(folder, panoptic=True))
    skipping = CocoFolder(config(folder, panoptic=True, on_bad="skip"))
    assert skipping.records[0].labels == before[:1] + before[2:]
    assert [a["category_id"] for a in CocoSource(config(folder, panoptic=True, on_bad="skip")).truth([0])["annotations"]
            ] == [label + 1 for label in before[2:]]  # fmt: skip


def test_a_panoptic_record_without_segments_takes_its_image_with_it(folder: Path) -> None:
    change_json(folder, "panoptic", lambda c: c["annotations"][0].pop("segments_info"))
    skipping = CocoFolder(config(folder, panoptic=True, on_bad="skip"))
    assert [record.id for record in skipping.records] == [1, 2, 3, 4]


def square(low: int, high: int) -> list[float]:
    return [low, low, high, low, high, high, low, high]


def test_a_folder_of_boxes_alone_has_no_masks(folder: Path) -> None:
    for empty in ([], None):
        change_json(
            folder, "instances", lambda c, empty=empty: [a.update(segmentation=empty) for a in c["annotations"]]
        )
        assert CocoFolder(config(folder)).example(0).ids is None


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [square(2, 9), [1, 2, 3, 4, 5]],
        [5, 6, 7, 8, 9, 10],
        [["a", "b", 1, 2, 3, 4]],
        [[float("nan"), 1, 2, 3, 4, 5]],
        [[1, 1, 1e9, 1, 5, 5]],
        {"size": [64, 64]},
        {"size": [64, 64], "counts": [3, -4]},
        {"size": [64, 64], "counts": [3, 9000]},
        {"size": [32, 64], "counts": [32 * 64]},
        "circle",
    ],
)
def test_what_is_no_mask_is_named_where_masks_are_wanted(folder: Path, segmentation: Any) -> None:
    change_json(folder, "instances", lambda c: c["annotations"][0].update(segmentation=segmentation))
    found = CocoFolder(config(folder))
    with pytest.raises(UserError, match=r"instances_train\.json: image 0, annotation 1: its segmentation is no mask"):
        found.example(0)
    assert found.example(0, masks=False).ids is None
    assert CocoFolder(config(folder, on_bad="skip")).readable(0)[0] == 1
    captioned = CaptionedCoco(config(folder), size=64)
    assert captioned.example(0)[1] == make_scene(SCENES, 0, 0).caption


def test_segments_of_another_size_are_named(folder: Path) -> None:
    png = folder / "annotations" / "panoptic_train" / f"{0:012d}.png"
    Image.new("RGB", (60, 50)).save(png)
    with pytest.raises(UserError, match=rf"{png.name}: is 60×50, but panoptic_train\.json says 64×64"):
        CocoFolder(config(folder, panoptic=True)).example(0)


def test_the_truth_is_what_was_kept_and_crowds(folder: Path) -> None:
    """Annotations need neither iscrowd nor area; one that was left out does not come back."""
    boxes = {"plain": [4, 4, 10, 20], "crowd": [0, 0, 30, 30], "broken": [5, 5, 9], "outside": [60, 60, 30, 30]}
    annotations: list[Any] = [
        {"id": i, "image_id": 2, "category_id": 1, "bbox": b} for i, b in enumerate(boxes.values())
    ]
    annotations[1] |= {"iscrowd": 1, "area": 77}
    change_json(folder, "instances", lambda c: c.update(annotations=[*annotations, "nothing"]))
    source = CocoSource(config(folder, on_bad="skip"))
    assert len(source.folder.problems) == 3
    truth = source.truth([1, 2])
    assert [(a["image_id"], a["bbox"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (2, [4, 4, 10, 20], 200, 0),
        (2, [0, 0, 30, 30], 77, 1),
    ]
    assert source.example(2).labels.tolist() == [0]
    seen = [
        *detection_records(2, found([0], [[4, 4, 14, 24]], [0.5]), source.category_ids),
        *detection_records(2, found([0, 0], [[15, 0, 30, 14], [20, 20, 30, 30]], [0.9, 0.8]), source.category_ids),
    ]
    assert average_precision(truth, seen)["AP"] == pytest.approx(1)  # what is found on the crowd counts neither way


def test_a_box_over_the_edge_by_rounding_is_cut(folder: Path) -> None:
    change_json(folder, "instances", lambda c: c["annotations"][0].update(bbox=[50, -0.5, 14.7, 20]))
    assert CocoFolder(config(folder)).records[0].boxes[0] == [50, 0, 64, 19.5]


def test_bad_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"instances_val2017.json: missing"):
        CocoFolder(CocoConfig(folder, "val2017"))
    image = folder / "train" / f"{0:012d}.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match="not an image that can be read"):
        CocoFolder(config(folder)).example(0)
    Image.new("RGB", (10, 10)).save(image)
    with pytest.raises(UserError, match=r"is 10×10, but instances_train\.json says 64×64"):
        CocoFolder(config(folder)).example(0)
    (folder / "annotations" / "panoptic_train" / f"{1:012d}.png").unlink()
    with pytest.raises(UserError, match=r"image 1: its segments .* are missing"):
        CocoFolder(config(folder, panoptic=True))
    assert len(CocoFolder(config(folder, panoptic=True, on_bad="skip"))) == COUNT - 1
    file = folder / "annotations" / "instances_train.json"
    file.write_text('{"images": [')
    with pytest.raises(UserError, match="not valid JSON"):
        CocoFolder(config(folder))
    file.write_text('{"images": []}')
    with pytest.raises(UserError, match="has no list 'annotations'"):
        CocoFolder(config(folder))


def test_a_broken_image_ends_the_training_or_is_replaced_by_the_next(folder: Path) -> None:
    (folder / "train" / f"{1:012d}.png").write_bytes(b"no picture")
    (folder / "train" / f"{2:012d}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000000000[12]\.png: not an image"):
        BatchLoader(DataConfig(coco=config(folder)), 0, COUNT, masks=False).train_batch(0)
    skipping = config(folder, on_bad="skip")
    whole = {scene.image.tobytes() for scene in (make_scene(SCENES, 0, i) for i in (0, 3, 4))}
    small = DataConfig(coco=skipping, resize=ResizeConfig((64,), 64))
    batch = BatchLoader(small, 0, COUNT, masks=False).train_batch(0)
    assert {image.tobytes() for image in batch.images_BHWC} | {
        image[:, ::-1].tobytes() for image in batch.images_BHWC
    } >= whole
    assert CocoFolder(skipping).readable(1)[0] == 3
    captioned = CaptionedCoco(skipping, size=64)
    assert [captioned.example(i)[1] for i in (0, 1, 2)] == [make_scene(SCENES, 0, i).caption for i in (0, 3, 3)]
    for i in (0, 3, 4):
        (folder / "train" / f"{i:012d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 5 images can be read"):
        CocoFolder(skipping).readable(2)


def test_an_image_of_more_pixels_than_pil_opens_is_a_broken_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"000000000000\.png: not an image that can be read \(Image size"):
        CocoFolder(config(folder)).example(0)


def test_collate_pads_and_keeps_boxes() -> None:
    rng = np.random.default_rng(0)
    small = Example(rng.integers(1, 255, (20, 30, 3), np.uint8), np.array([2, 1]),
                    np.array([[3, 4, 9, 10], [0, 0, 30, 20]], np.float32), np.full((20, 30), 2, np.int16))  # fmt: skip
    large = Example(rng.integers(1, 255, (40, 24, 3), np.uint8), np.array([5]),
                    np.array([[0, 10, 12, 40]], np.float32), np.ones((40, 24), np.int16))  # fmt: skip
    device = collate([small, large]).to_device("cpu")
    assert device.images_BCHW.shape == (2, 3, 40, 30)
    assert device.valid_BHW is not None
    assert device.valid_BHW.sum((1, 2)).tolist() == [600, 960]
    assert not device.images_BCHW[0, :, 20:].any()
    targets = device.targets
    assert targets.valid_BT.tolist() == [[True, True], [True, False]]
    pixels = cxcywh_to_xyxy(targets.boxes_BT4[0]) * torch.tensor([30, 20, 30, 20])
    torch.testing.assert_close(pixels, torch.from_numpy(small.boxes))
    assert targets.masks_BTHW is not None
    assert targets.masks_BTHW.sum((2, 3)).tolist() == [[0, 600], [960, 0]]
    assert collate([small]).to_device("cpu").valid_BHW is None


def coco_dataset(boxes: list[tuple[int, int, list[float]]]) -> dict[str, Any]:
    annotations = [
        {"id": i + 1, "image_id": image, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0],
         "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
        for i, (image, category, (x0, y0, x1, y1)) in enumerate(boxes)
    ]  # fmt: skip
    images = [{"id": i, "height": 100, "width": 100} for i in sorted({image for image, _, _ in boxes})]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def found(labels: list[int], boxes: list[list[float]], scores: list[float]) -> Detections:
    n = len(labels)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes).view(n, 4), torch.arange(n))


def test_average_precision_by_hand() -> None:
    """Class 1: found perfectly; class 2: one of two found, at IoU 0.8, after a false alarm."""
    dataset = coco_dataset([(0, 1, [10, 10, 50, 50]), (0, 2, [60, 60, 90, 90]), (1, 2, [0, 0, 40, 40])])
    perfect = [(0, found([0, 1], [[10, 10, 50, 50], [60, 60, 90, 90]], [0.9, 0.8])),
               (1, found([1], [[0, 0, 40, 40]], [0.7]))]  # fmt: skip
    records = [r for number, d in perfect for r in detection_records(number, d, [1, 2])]
    figures = average_precision(dataset, records)
    assert figures["AP"] == figures["AP50"] == pytest.approx(1)
    assert average_precision(dataset, [])["AP"] == 0
    mixed = [(0, found([0, 1], [[10, 10, 50, 50], [0, 0, 20, 20]], [0.9, 0.8])),
             (1, found([1], [[0, 0, 40, 32]], [0.7]))]  # fmt: skip
    records = [r for number, d in mixed for r in detection_records(number, d, [1, 2])]
    figures = average_precision(dataset, records)
    # Class 2 has precision 1/2 up to recall 1/2 (51 of 101 points), at the 7 of 10 thresholds up to 0.8.
    second = 0.5 * 51 / 101
    assert figures["AP50"] == pytest.approx((1 + second) / 2)
    assert figures["AP"] == pytest.approx((1 + 0.7 * second) / 2)


def test_panoptic_quality_by_hand() -> None:
    truth = np.zeros((10, 10), int)
    truth[:, :5], truth[:5, 5:], truth[5:, 5:] = 1, 2, 3
    labels = {1: 0, 2: 1, 3: 1}
    quality = PanopticQuality()
    quality.add(truth, labels, truth, labels)
    assert quality.result(stuff={0}) == {"PQ": 1, "SQ": 1, "RQ": 1, "PQ_things": 1, "PQ_stuff": 1}

    found = truth.copy()
    found[:, 4] = 0  # segment 1 keeps 40 of 50 pixels: IoU 0.8
    found[5:, 5:] = 2  # 2 swallows 3: IoU 25/50, no match, so a false alarm and two misses
    quality = PanopticQuality()
    quality.add(truth, labels, found, {1: 0, 2: 1})
    result = quality.result(stuff={0})
    assert result["PQ_stuff"] == pytest.approx(0.8)
    assert result["PQ_things"] == 0
    assert result["PQ"] == pytest.approx(0.4)
    assert result["RQ"] == pytest.approx(0.5)


def test_panoptic_quality_void_and_crowds() -> None:
    truth = np.zeros((10, 10), int)
    truth[:, :5], truth[:5, 5:] = 1, 2  # the rest is void
    found = truth.copy()
    found[5:, 5:] = 3  # on void only: no mistake
    found[5:, :5] = 1
    found[:, 4:5] = 1
    quality = PanopticQuality()
    quality.add(truth, {1: 0, 2: 1}, found, {1: 0, 2: 1, 3: 1})
    assert quality.result()["PQ"] == 1

    crowd = PanopticQuality()  # 2 is a crowd of class 1: what is found on it counts neither way
    crowd.add(truth, {1: 0, 2: 1}, found, {1: 0, 2: 1, 3: 1}, crowds={2})
    assert crowd.result()["PQ"] == 1
    assert 1 not in crowd.classes or crowd.classes[1].missed == 0

    wider = truth.copy()
    wider[5:, :] = 1  # segment 1 spills over void: those 25 pixels are not in the union
    quality = PanopticQuality()
    quality.add(truth, {1: 0, 2: 1}, wider, {1: 0, 2: 1})
    assert quality.classes[0].iou == 1
