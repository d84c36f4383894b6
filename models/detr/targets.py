"""What a batch of images should be detected as.

B images, T objects at most, H×W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Objects of each image, padded to the same number; what `valid` leaves out means nothing.

    A batch of one shape costs the GPU a few large kernels where a list of tensors costs it many small ones.
    """

    labels_BT: Tensor  # int64
    boxes_BT4: Tensor  # cxcywh in [0, 1], relative to the image without its padding
    valid_BT: Tensor  # bool
    masks_BTHW: Tensor | None = None  # bool

    @staticmethod
    def stack(labels: list[Tensor], boxes: list[Tensor], masks: list[Tensor] | None = None) -> "Targets":
        """Pad and stack: labels (t,), boxes (t, 4) and masks (t, H, W) of each image."""
        pad = torch.nn.utils.rnn.pad_sequence
        valid = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in labels]
        return Targets(
            pad(labels, True), pad(boxes, True), pad(valid, True), None if masks is None else pad(masks, True)
        )

    def to(self, device: torch.device | str) -> "Targets":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        masks = None if self.masks_BTHW is None else move(self.masks_BTHW)
        return Targets(move(self.labels_BT), move(self.boxes_BT4), move(self.valid_BT), masks)
