"""The small DETR that these tests vary."""

from models.detr.config import DetrConfig, ResNetConfig

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
