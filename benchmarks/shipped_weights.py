"""How good the models that come with the package are, on the CPU: the detector, also as a judge, and the painter.

    python -m benchmarks.shipped_weights    # five minutes of two cores

AP and panoptic quality are on held-out scenes. Scene agreement is on real captioned scenes, where a perfect judge would
say 1, and on the same scenes with the caption of the next one, where what it says is chance and its mistakes; then on
what latent diffusion draws of held-out captions, with guidance and without.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from agents.vision.detection_score import evaluate_detector
from agents.vision.pictures import as_bytes
from benchmarks.record import write_result
from envs.vision.captioned import CaptionedConfig, CaptionedLoader
from envs.vision.scene_agreement import SceneAgreement
from envs.vision.scenes import SceneConfig
from envs.vision.shipped_weights import WEIGHTS
from envs.vision.sources import BatchLoader, DataConfig, make_source
from models.detr.checkpoint import load_detr
from models.diffusion.folder import load_folder
from models.diffusion.pipeline import text_to_image

DETECTOR = WEIGHTS / "detr-scenes"
PAINTER = WEIGHTS / "diffusion-scenes"
BATCH = 64


@dataclasses.dataclass
class Config:
    images: int = 1000
    captioned: int = 512
    drawn: int = 128
    output: Path = Path("benchmarks/results/shipped_weights.json")


def main(config: Config) -> None:
    ours = detection(config.images) | agreement(config.captioned) | drawing(config.drawn)
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
        "agreement": mean_agreement(judge, np.asarray(images), captions),
        "agreement_with_the_next_caption": mean_agreement(judge, np.asarray(images), shifted),
    }


def drawing(count: int) -> dict[str, Any]:
    data = CaptionedConfig(scenes=SceneConfig(size=128, max_objects=3), heldout_images=count)
    captions = CaptionedLoader(data, 0).load(True, 0, count)[1]
    model, judge = load_folder(PAINTER), SceneAgreement(DETECTOR)
    model.scheduler = model.scheduler.with_name("dpm++")
    found: dict[str, Any] = {"drawn_images": count}
    for guidance in (1.0, 4.0):
        parts = []
        for at in range(0, count, BATCH):
            noise, batch = torch.Generator().manual_seed(at), captions[at : at + BATCH]
            parts.append(as_bytes(text_to_image(model, batch, steps=25, guidance=guidance, generator=noise)))
        images = np.concatenate(parts)
        found[f"drawn_agreement/guidance_{guidance:g}"] = mean_agreement(judge, images, captions)
    shifted = [*captions[1:], captions[0]]
    return found | {"drawn_agreement_with_the_next_caption": mean_agreement(judge, images, shifted)}


def mean_agreement(judge: SceneAgreement, images: np.ndarray, captions: list[str]) -> float:
    return round(float(np.mean(judge(images, captions))), 4)


if __name__ == "__main__":
    main(tyro.cli(Config))
