"""How good the detector that comes with the package is, on the CPU, and as the judge of pictures that are right.

    python -m benchmarks.shipped_weights    # a minute of one core

AP and panoptic quality are on held-out scenes. Scene agreement is on real captioned scenes, where a perfect judge would
say 1, and on the same scenes with the caption of the next one, where what it says is chance and its mistakes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.vision.detection_score import evaluate_detector
from benchmarks.record import write_result
from envs.vision.captioned import CaptionedConfig, CaptionedLoader
from envs.vision.scene_agreement import SceneAgreement
from envs.vision.scenes import SceneConfig
from envs.vision.shipped_weights import WEIGHTS
from envs.vision.sources import BatchLoader, DataConfig, make_source
from models.detr.checkpoint import load_detr

DETECTOR = WEIGHTS / "detr-scenes"
BATCH = 64


@dataclasses.dataclass
class Config:
    images: int = 1000
    captioned: int = 512
    output: Path = Path("benchmarks/results/shipped_weights.json")


def main(config: Config) -> None:
    ours = detection(config.images) | agreement(config.captioned)
    write_result(config.output, "shipped_weights", ours)
    print(json.dumps(ours, indent=1))


def detection(count: int) -> dict[str, Any]:
    data = DataConfig()
    loader = BatchLoader(data, 0, BATCH, masks=True)
    batches = (loader.heldout_batch(at, min(BATCH, count - at)) for at in range(0, count, BATCH))
    figures = evaluate_detector(load_detr(DETECTOR), batches, make_source(data, 0, heldout=True), count, "cpu")
    return {"images": count, **{name: round(figures[f"eval/{name}"], 4) for name in ("AP", "AP50", "PQ")}}


def agreement(count: int) -> dict[str, Any]:
    data = CaptionedConfig(scenes=SceneConfig(size=128, max_objects=3), heldout_images=count)
    images, captions = CaptionedLoader(data, 0).load(True, 0, count)
    judge = SceneAgreement(DETECTOR)
    shifted = [*captions[1:], captions[0]]
    return {
        "captioned_images": count,
        "agreement": round(float(np.mean(judge(np.asarray(images), captions))), 4),
        "agreement_with_the_next_caption": round(float(np.mean(judge(np.asarray(images), shifted))), 4),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
