"""Scenes as COCO has them: files for others to read, and the same records in memory for COCO's evaluation.

FOLDER/train/000000000007.png                the image
FOLDER/annotations/instances_train.json      boxes, masks (run-length encoded), categories
FOLDER/annotations/captions_train.json
FOLDER/annotations/panoptic_train.json       segments, with the background as stuff
FOLDER/annotations/panoptic_train/*.png      segment numbers as colours: R + 256 G + 65536 B
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from envs.vision.scene_spec import CATEGORIES, STUFF
from envs.vision.scenes import Scene, SceneConfig, Split, make_scene
from models.errors import UserError


def categories(names: Sequence[str] = CATEGORIES, stuff: frozenset[int] = STUFF) -> list[dict[str, Any]]:
    """COCO numbers categories from 1."""
    return [
        {"id": i + 1, "name": name, "supercategory": "stuff" if i in stuff else "thing", "isthing": int(i not in stuff)}
        for i, name in enumerate(names)
    ]


def instance_records(
    number: int, labels: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, first_id: int
) -> list[dict[str, Any]]:
    """The annotations of image `number`: labels (n,), boxes xyxy (n, 4), masks (n, H, W) or None."""
    records = []
    for i, (label, box) in enumerate(zip(labels.tolist(), boxes.astype(float).tolist())):
        x0, y0, x1, y1 = box
        record: dict[str, Any] = {
            "id": first_id + i,
            "image_id": number,
            "category_id": label + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        if masks is not None:
            encoded = coco_mask.encode(np.asfortranarray(masks[i].astype(np.uint8)))
            record["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
            record["area"] = float(masks[i].sum())
        records.append(record)
    return records


def write_scenes(
    folder: str | Path, config: SceneConfig, seed: int, count: int, split: Split = "train", first: int = 0
) -> None:
    """Write scenes number `first` to `first + count - 1` of a split. Raises UserError if the disk refuses."""
    write_coco(folder, ((first + i, make_scene(config, seed, first + i, split)) for i in range(count)), split)


def write_coco(folder: str | Path, scenes: Iterable[tuple[int, Scene]], split: str) -> None:
    """Write numbered scenes. Raises UserError if the disk refuses."""
    folder = Path(folder)
    annotations = folder / "annotations"
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    try:
        (folder / split).mkdir(parents=True, exist_ok=True)
        (annotations / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
        for number, scene in scenes:
            name = f"{number:012d}.png"
            height, width = scene.ids.shape
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            records = instance_records(number, scene.labels, scene.boxes, scene.masks, len(instances) + 1)
            instances += records
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": scene.caption})
            panoptic.append({"image_id": number, "file_name": name, "segments_info": _segments(scene, records)})
            Image.fromarray(scene.image).save(folder / split / name)
            colours = np.stack([scene.ids + 1, np.zeros_like(scene.ids), np.zeros_like(scene.ids)], -1)
            Image.fromarray(colours).save(annotations / f"panoptic_{split}" / name)
        things = [c for c in categories() if c["isthing"]]
        for kind, content in (
            ("instances", {"images": images, "annotations": instances, "categories": things}),
            ("captions", {"images": images, "annotations": captions}),
            ("panoptic", {"images": images, "annotations": panoptic, "categories": categories()}),
        ):
            (annotations / f"{kind}_{split}.json").write_text(json.dumps(content))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the scenes ({error.strerror or error})") from None


def _segments(scene: Scene, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segment 1 is the background, i + 2 object i."""
    keys = ("category_id", "bbox", "area", "iscrowd")
    height, width = scene.ids.shape
    background = {
        "id": 1,
        "category_id": scene.spec.background_label + 1,
        "bbox": [0, 0, width, height],
        "area": int((scene.ids == 0).sum()),
        "iscrowd": 0,
    }
    return [background, *({"id": i + 2, **{k: record[k] for k in keys}} for i, record in enumerate(records))]
