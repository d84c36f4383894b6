import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.vision.detection_score import evaluate_detector
from envs.vision.coco import CocoConfig
from envs.vision.coco_format import write_scenes
from envs.vision.scenes import make_scene
from envs.vision.sources import BatchLoader, DataConfig, SceneSource, make_source
from envs.vision.transforms import ResizeConfig
from models.detr.detr import DetrOutput
from tests.agents.vision.test_detr import SCENES, Oracle, batches, heldout


def test_perfect_answers_score_one() -> None:
    source = SceneSource(SCENES, 0, "heldout")
    batch = batches(source, 0, 6)
    targets = batch.to_device("cpu").targets
    assert targets.masks_BTHW is not None
    logits = torch.nn.functional.one_hot(targets.labels_BT.where(targets.valid_BT, 21), 22).float() * 20
    answer = DetrOutput(logits[None], targets.boxes_BT4[None], targets.masks_BTHW.float() * 40 - 20)
    figures = evaluate_detector(Oracle(answer), heldout(batch), source, 6, "cpu")
    assert figures["eval/AP"] == figures["eval/AP50"] == pytest.approx(1)
    assert figures["eval/PQ"] == pytest.approx(1)
    shifted = targets.boxes_BT4 + torch.tensor([0.0, 0.0, 0.03, 0.03])
    worse = evaluate_detector(Oracle(DetrOutput(logits[None], shifted[None], None)), heldout(batch), source, 6, "cpu")
    assert 0.1 < worse["eval/AP"] < 0.95


def test_panoptic_quality_knows_crowds_and_the_images_own_size(tmp_path: Path) -> None:
    """An object is made a crowd: to find a part of it is no mistake, unless as another class."""
    write_scenes(tmp_path, replace(SCENES, size=96, min_objects=2), seed=0, count=1, split="heldout")
    file = tmp_path / "annotations" / "panoptic_heldout.json"
    content = json.loads(file.read_text())
    crowd, *others = content["annotations"][0]["segments_info"][1:]
    crowd["iscrowd"] = 1
    file.write_text(json.dumps(content))
    coco = CocoConfig(tmp_path, "heldout", panoptic=True)
    data = DataConfig(coco=coco, heldout_split="heldout", resize=ResizeConfig((64,), 64))
    [batch] = [BatchLoader(data, 0, 1, masks=True).heldout_batch(0, 1)]
    [truth] = batch.segments
    scene = make_scene(replace(SCENES, size=96, min_objects=2), 0, 0, "heldout")
    assert truth.ids.shape == (96, 96)
    assert truth.crowds == {len(truth.labels)}
    assert np.array_equal(truth.ids == len(truth.labels), scene.ids == 1)
    assert batch.batch is not None
    assert batch.batch.ids_BHW is not None
    assert batch.batch.ids_BHW.shape[1:] == (64, 64)
    masks = torch.stack([torch.from_numpy(truth.ids == number) for number in truth.labels])
    source = make_source(data, 0, heldout=True)

    part = masks[-1].clone()
    part[:, masks[-1].any(0).nonzero()[3] :] = False  # three columns of it
    masks[-1] = part

    def quality(label_of_crowd: int) -> float:
        labels = torch.tensor([*list(truth.labels.values())[:-1], label_of_crowd])
        logits = torch.nn.functional.one_hot(labels, 22).float() * 20
        boxes = torch.full((1, 1, len(labels), 4), 0.5)
        oracle = Oracle(DetrOutput(logits[None, None], boxes, masks[None].float() * 40 - 20))
        return evaluate_detector(oracle, [batch], source, 1, "cpu")["eval/RQ"]

    label = crowd["category_id"] - 1
    another = next(n for n in range(16) if n != label and n + 1 not in [s["category_id"] for s in others])
    assert quality(label) == pytest.approx(1)
    assert quality(another) < 0.9
