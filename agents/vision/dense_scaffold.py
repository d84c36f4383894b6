"""Dense supervision of a backbone that starts from random weights.

The set loss reaches the backbone through a few queries an image, and only once these know where to look. So while a
backbone is young, a linear head on its last feature map also names the object at each cell: the label of the smallest
box over the cell's centre. The head is no part of the detector and is thrown away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detr.boxes import area, cxcywh_to_xyxy
from models.detr.detr import Detr, DetrOutput
from models.detr.targets import Targets


class DenseScaffold(nn.Module):
    """A detector and the head beside it."""

    def __init__(self, net: Detr) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Conv2d(net.config.backbone.hidden_sizes[-1], net.config.num_labels + 1, 1)

    def forward(self, images_BCHW: Tensor, valid_BHW: Tensor | None = None) -> tuple[DetrOutput, Tensor]:
        """Returns the detector's output and logits (B, C, h, w) of the cells, "no object" last."""
        features = self.net.backbone(images_BCHW)
        return self.net.detect(features, valid_BHW), self.head(features[-1])


def dense_loss(logits_BChw: Tensor, targets: Targets, valid_BHW: Tensor | None) -> Tensor:
    """Mean cross-entropy over all cells; those of padding are no object."""
    classes, height, width = logits_BChw.shape[1:]
    return F.cross_entropy(logits_BChw.float(), cell_labels(targets, valid_BHW, height, width, classes - 1))


def cell_labels(targets: Targets, valid_BHW: Tensor | None, height: int, width: int, no_object: int) -> Tensor:
    """Labels (B, height, width): of the smallest box over each cell's centre."""
    device = targets.boxes_BT4.device
    x = (torch.arange(width, device=device) + 0.5) / width
    y = (torch.arange(height, device=device) + 0.5) / height
    boxes_BT4 = cxcywh_to_xyxy(targets.boxes_BT4)
    if valid_BHW is not None:  # boxes are relative to the image, cells to the image with its padding
        columns, rows = valid_BHW[:, 0].float().mean(1), valid_BHW[:, :, 0].float().mean(1)
        boxes_BT4 = boxes_BT4 * torch.stack([columns, rows, columns, rows], -1)[:, None]
    x0, y0, x1, y1 = (side[..., None, None] for side in boxes_BT4.unbind(-1))
    over_BThw = (x0 <= x) & (x < x1) & (y0 <= y[:, None]) & (y[:, None] < y1) & targets.valid_BT[..., None, None]
    sizes_BThw = area(boxes_BT4)[..., None, None].where(over_BThw, torch.inf)
    size_Bhw, nearest_Bhw = sizes_BThw.min(1)
    labels_Bhw = targets.labels_BT[..., None].expand(-1, -1, height * width).gather(1, nearest_Bhw.flatten(1)[:, None])
    return labels_Bhw.view_as(nearest_Bhw).where(size_Bhw.isfinite(), no_object)
