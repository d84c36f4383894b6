"""On a GPU: a UNet by CUDA graphs against the UNet itself, output and gradients, as weights and shapes change."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models.diffusion.graphed_unet import GraphedUNet
from models.diffusion.lora import attach_lora
from models.diffusion.unet import UNet
from models.language.lora import LoraConfig
from tests.models.diffusion.small_models import tiny_latent_diffusion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def unet() -> UNet:
    """With adapters that do something."""
    unet = tiny_latent_diffusion().unet.cuda()
    attach_lora(unet, LoraConfig(4, 4.0, ("to_q", "to_v")), seed=0)
    move(unet, 0.1)
    return unet


def move(unet: nn.Module, by: float) -> None:
    """What an optimizer does."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn_like(parameter)


def inputs(unet: UNet, images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    side, width = unet.config.sample_size or 8, unet.config.cross_attention_dim
    x_BCHW = torch.randn(images, unet.config.in_channels, side, side, device="cuda")
    return x_BCHW, torch.randint(1000, (images,), device="cuda").float(), torch.randn(images, 7, width, device="cuda")


def close(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)  # convolutions in TF32


@torch.no_grad()
def test_the_output_is_the_same_for_each_shape_and_after_steps_of_the_optimizer(unet: UNet) -> None:
    graphed = GraphedUNet(unet)
    kept = []
    for seed, images in enumerate((2, 3, 2, 3)):
        given = inputs(unet, images, seed)
        kept.append((graphed(*given), unet(*given)))
        move(unet, 0.1)
    for output, expected in kept:  # later calls did not write into the earlier ones' outputs
        close(output, expected)
    x_BCHW, _, context_BME = inputs(unet, 2, seed=9)
    close(graphed(x_BCHW, 250.0, context_BME), unet(x_BCHW, 250.0, context_BME))


def test_gradients_of_several_batches_add_up(unet: UNet) -> None:
    plain = copy.deepcopy(unet)
    graphed = GraphedUNet(unet)
    for seed, images in enumerate((2, 2, 3, 2)):
        given = inputs(unet, images, seed)
        graphed(*given).square().mean().backward()
        plain(*given).square().mean().backward()
    pairs = [(ours.grad, expected.grad) for ours, expected in zip(unet.parameters(), plain.parameters(), strict=True)]
    trained = [(ours, expected) for ours, expected in pairs if expected is not None]
    assert trained
    for ours, expected in trained:
        assert ours is not None
        scale = expected.abs().max()
        close(ours / scale, expected / scale)
    assert all(ours is None for ours, expected in pairs if expected is None)
