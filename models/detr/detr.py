"""DETR: backbone, transformer, heads. Names of parameters are those of the original code, without its wrappers.

B images, H×W pixels, Q queries, K cells of the feature map, L decoder layers, D width, C classes with "no object" last.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detr.config import DetrConfig
from models.detr.mask_head import AttentionMap, MaskHead
from models.detr.position import sine_position
from models.detr.resnet import ResNet
from models.detr.transformer import Transformer

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DetrOutput:
    """The predictions after every decoder layer; the last layer's are the model's answer.

    boxes are cxcywh in [0, 1], relative to an image without its padding. masks are logits at the stride of the finest
    feature map, for the last layer, if the model has a mask head.
    """

    logits_LBQC: Tensor
    boxes_LBQ4: Tensor
    masks_BQHW: Tensor | None = None

    @property
    def logits_BQC(self) -> Tensor:
        return self.logits_LBQC[-1]

    @property
    def boxes_BQ4(self) -> Tensor:
        return self.boxes_LBQ4[-1]


class MLP(nn.Module):
    """Three linear layers with ReLU between: the box head."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise([dim, dim, dim, outputs]))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


class Detr(nn.Module):
    """freeze_batch_norm: see ResNet; False only while a backbone is trained from scratch."""

    def __init__(self, config: DetrConfig, freeze_batch_norm: bool = True) -> None:
        super().__init__()
        self.config = config
        dim = config.d_model
        channels = config.backbone.hidden_sizes
        self.backbone = ResNet(config.backbone, freeze_batch_norm)
        self.input_proj = nn.Conv2d(channels[-1], dim, 1)
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(dim, config.num_labels + 1)
        self.bbox_embed = MLP(dim, 4)
        if config.mask_head:
            self.bbox_attention = AttentionMap(dim, config.encoder_attention_heads)
            self.mask_head = MaskHead(dim, config.encoder_attention_heads, channels[2::-1])

    def forward(self, images_BCHW: Tensor, valid_BHW: Tensor | None = None, masks: bool = True) -> DetrOutput:
        """images: normalised by IMAGE_MEAN and IMAGE_STD. valid: False at padding; None if nothing is padded.

        masks: predict them too, if the model has a mask head. They cost about as much as all the rest.
        """
        return self.detect(self.backbone(images_BCHW), valid_BHW, masks)

    def detect(self, features: list[Tensor], valid_BHW: Tensor | None, masks: bool = True) -> DetrOutput:
        """What follows the backbone. features: its maps from fine to coarse."""
        x_BDHW = self.input_proj(features[-1])
        rows, columns = x_BDHW.shape[-2:]
        if valid_BHW is None:
            cells = x_BDHW.new_ones((1, rows, columns), dtype=torch.bool)
            valid_BK = None
        else:
            cells = F.interpolate(valid_BHW[None].float(), size=(rows, columns))[0].bool()
            valid_BK = cells.flatten(1)
        position_BKD = sine_position(cells, self.config.d_model, x_BDHW.dtype).flatten(1, 2)
        x_BKD = x_BDHW.flatten(2).transpose(1, 2)
        hidden_LBQD, memory_BKD = self.transformer(x_BKD, position_BKD, self.query_embed.weight, valid_BK)
        masks_BQHW = None
        if self.config.mask_head and masks:
            attention_BQNK = self.bbox_attention(hidden_LBQD[-1], memory_BKD, valid_BK)
            masks_BQHW = self.mask_head(x_BDHW, attention_BQNK.unflatten(-1, (rows, columns)), features[2::-1])
        # Never in lower precision than the weights: a box in bfloat16 is good to half a pixel in 128.
        with torch.autocast(hidden_LBQD.device.type, enabled=False):
            hidden_LBQD = hidden_LBQD.to(self.class_embed.weight.dtype)
            logits_LBQC, boxes_LBQ4 = self.class_embed(hidden_LBQD), self.bbox_embed(hidden_LBQD).sigmoid()
        return DetrOutput(logits_LBQC, boxes_LBQ4, masks_BQHW)


def normalise_images(images_BHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, H, W, 3) → (B, 3, H, W), channels last in memory, normalised by IMAGE_MEAN and IMAGE_STD."""
    mean, std = _image_statistics(images_BHWC.device)
    return ((images_BHWC.float() / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)


@functools.cache
def _image_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Once a device: to make a tensor of a list there waits for everything that the GPU still has to do."""
    return torch.tensor(IMAGE_MEAN, device=device), torch.tensor(IMAGE_STD, device=device)
