"""What the vision environments take from the environment variables, since an agent names them by their id alone.

    LONGSTRIDE_VISION_DEVICE   where their models run: cpu (the default) or cuda
    LONGSTRIDE_VISION_SPLIT    which scenes they show: train (the default) or heldout

Ray hides GPUs from workers that ask for none, as those of control agents do: with `cuda`, run the agent by
`--backend local`, where environment, model and policy share one process, the policy on the CPU.
"""

import os
from typing import cast

import torch

from envs.vision.scenes import Split
from models.errors import UserError

DEVICE_VARIABLE, SPLIT_VARIABLE = "LONGSTRIDE_VISION_DEVICE", "LONGSTRIDE_VISION_SPLIT"


def vision_device(given: str | None) -> str:
    """Raises UserError for a GPU that this process cannot see."""
    device = given or os.environ.get(DEVICE_VARIABLE) or "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"{DEVICE_VARIABLE} is {device!r}: must be cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{DEVICE_VARIABLE} is {device}, but this process sees no GPU: give --backend local, since Ray's workers "
            "that play environments have none"
        )
    return device


def vision_split(given: Split | None) -> Split:
    split = given or os.environ.get(SPLIT_VARIABLE) or "train"
    if split not in ("train", "heldout"):
        raise UserError(f"{SPLIT_VARIABLE} is {split!r}: must be train or heldout")
    return cast(Split, split)
