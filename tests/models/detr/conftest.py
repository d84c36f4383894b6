"""transformers' DETR with random weights, small but with every structural element."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, DetrForSegmentation, ResNetConfig

transformers.logging.set_verbosity_error()


def peer_model(segmentation: bool = False, layer_type: str = "bottleneck", stages: int = 4, **changes: Any) -> Any:
    """Random weights everywhere: also norms and biases, which begin as ones and zeros."""
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 40, 48, 64][:stages],
        depths=[2, 1, 1, 2][:stages],
        layer_type=layer_type,
        out_features=[f"stage{i + 1}" for i in range(stages)],
    )
    config = DetrConfig(
        backbone_config=backbone,
        **{
            "use_timm_backbone": False,
            "num_labels": 5,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 40,
            "num_queries": 7,
            **changes,
        },
    )
    torch.manual_seed(0)
    model = (DetrForSegmentation if segmentation else DetrForObjectDetection)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def box_peer() -> Any:
    return peer_model()


@pytest.fixture(scope="session")
def mask_peer() -> Any:
    return peer_model(segmentation=True)


@pytest.fixture(scope="session")
def batch() -> tuple[Tensor, Tensor]:
    """Two images (2, 3, 96, 128), of which the second is padded; what is valid (2, 96, 128)."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 96, 128, dtype=torch.bool)
    valid[1, 70:] = valid[1, :, 90:] = False
    return images * valid[:, None], valid
