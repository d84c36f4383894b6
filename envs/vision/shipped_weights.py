"""The small trained models that come with the package, in half precision, at most 10 MB each: an eye and a painter.

    weights/detr-scenes        python -m benchmarks.detr_scenes --weights envs/vision/weights/detr-scenes
    weights/diffusion-scenes   python -m benchmarks.diffusion_scenes --weights envs/vision/weights/diffusion-scenes

Beside each lies figures.json: the command that made it and how well it does.
"""

from pathlib import Path
from typing import Literal

from models.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
Kind = Literal["detr", "diffusion"]


def scenes_model(kind: Kind, given: str | Path | None, how_to_give: str) -> Path:
    """The folder that the user gives, or else the one that comes with the package.

    how_to_give: where the user may name a folder, for the message. Raises UserError if there is no such folder.
    """
    folder = Path(given) if given else WEIGHTS / f"{kind}-scenes"
    if not folder.exists():
        missing = f"{folder}: no model there" if given else f"no {kind} model of scenes comes with this installation"
        recipe = f"longstride train {kind} --recipe {kind}-scenes-gpu"
        raise UserError(f"{missing}; train one ({recipe}) and give its folder, RUN/model/final, by {how_to_give}")
    return folder
