"""The small DETR that these tests vary, and a backbone whose norms do something."""

import torch

from models.detr.config import DetrConfig, ResNetConfig
from models.detr.resnet import ResNet

SMALL = DetrConfig(
    num_labels=4,
    num_queries=5,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    mask_head=True,
    backbone=ResNetConfig("bottleneck", (1, 1, 1), (16, 32, 32), 8),
)


def resnet_with_statistics(kind: str = "bottleneck") -> ResNet:
    """In evaluation, its frozen norms' statistics and affine parameters random; the same at every call."""
    torch.manual_seed(0)
    resnet = ResNet(ResNetConfig(kind, (2, 2), (32, 64), 8)).eval()
    for name, buffer in resnet.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5 if "var" in name else torch.randn(buffer.shape))
    return resnet
