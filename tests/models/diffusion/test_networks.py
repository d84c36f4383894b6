"""UNet, autoencoder and text encoder against diffusers and transformers: same weights, same output."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.diffusion.autoencoder import Autoencoder
from models.diffusion.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from models.diffusion.text_encoder import TextEncoder
from models.diffusion.unet import UNet
from models.errors import UserError
from tests.models.diffusion.small_models import AUTOENCODER, TEXT, UNET, autoencoders, text_encoders, unets

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("size", [(8, 8), (9, 14)], ids=["even", "odd"])
@pytest.mark.parametrize("time", [torch.tensor(7), torch.tensor([981, 3]), torch.tensor(333.25)])
@torch.no_grad()
def test_unet(size: tuple[int, int], time: torch.Tensor) -> None:
    ours, reference = unets()
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, *size), torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x, time, context), reference(x, time, context).sample, **TOLERANCE)


def test_unet_gradients() -> None:
    ours, reference = unets()
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    ours(x, 10, context).square().sum().backward()
    reference(x, 10, context).sample.square().sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_autoencoder_both_ways() -> None:
    ours, reference = autoencoders()
    torch.manual_seed(1)
    image = torch.rand(2, 3, 64, 48) * 2 - 1
    posterior, expected = ours.encode(image), reference.encode(image).latent_dist
    torch.testing.assert_close(posterior.mean_BZhw, expected.mean, **TOLERANCE)
    torch.testing.assert_close(posterior.log_variance_BZhw, expected.logvar, **TOLERANCE)
    torch.testing.assert_close(posterior.kl(), expected.kl(), **TOLERANCE)
    sample = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(sample, expected.sample(torch.Generator().manual_seed(3)), **TOLERANCE)
    torch.testing.assert_close(ours.decode(sample), reference.decode(sample).sample, **TOLERANCE)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_text_encoder(activation: str) -> None:
    ours, reference = text_encoders(hidden_act=activation)
    tokens = torch.randint(0, 600, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = reference(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(ours(tokens), expected, **TOLERANCE)


def test_stable_diffusion_v1_shape() -> None:
    """Every parameter of the real sizes, by name and shape."""
    with torch.device("meta"):
        pairs = [
            (UNet(UNetConfig.sd_v1()), UNet2DConditionModel(sample_size=64, cross_attention_dim=768)),
            (
                Autoencoder(AutoencoderConfig.sd_v1()),
                AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512),
                    layers_per_block=2,
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                ),
            ),
            (
                TextEncoder(TextEncoderConfig.sd_v1()),
                CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
            ),
        ]
    for ours, reference in pairs:
        shapes = {name: parameter.shape for name, parameter in reference.named_parameters()}
        assert {name: parameter.shape for name, parameter in ours.named_parameters()} == shapes
    millions = [round(sum(p.numel() for p in ours.parameters()) / 1e6) for ours, _ in pairs]
    assert millions == [860, 84, 123]


def test_configurations_survive_json() -> None:
    for config in (UNetConfig(**UNET), AutoencoderConfig(**AUTOENCODER), TextEncoderConfig(**TEXT)):
        assert type(config).from_json(config.to_json(), "config.json") == config


def test_the_references_own_json_is_understood() -> None:
    reference = UNet2DConditionModel(**UNET)
    assert UNetConfig.from_json(dict(reference.config), "config.json") == UNetConfig(**UNET)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_linear_projection": True}, "use_linear_projection"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        ({"attention_head_dim": [5, 10, 20]}, "attention_head_dim"),
        ({"attention_head_dim": 5}, "5 heads"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
    ],
)
def test_another_architecture_is_refused_by_its_setting(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        UNetConfig.from_json(UNetConfig(**UNET).to_json() | changes, "unet/config.json")


@torch.no_grad()
def test_a_timestep_is_a_number_or_a_tensor_of_one_or_of_each_image() -> None:
    unet, _ = unets()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    expected = unet(x, torch.tensor([7, 7]), context)
    for time in (7, 7.0, torch.tensor(7)):
        assert torch.equal(unet(x, time, context), expected)
