import pytest
import torch

from models.diffusion.fused_unet import fuse
from models.diffusion.lora import ATTENTION, attach_lora
from models.diffusion.pipeline import text_to_image
from models.language.lora_layers import LoraConfig
from tests.models.diffusion.small_models import latent_diffusion, unets


@pytest.mark.parametrize("time", [torch.tensor(7), torch.tensor([981, 3])])
@torch.no_grad()
def test_a_fused_unet_computes_what_diffusers_does(time: torch.Tensor) -> None:
    ours, reference = unets()
    fuse(ours)
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 9, 14), torch.randn(2, 5, 24)
    expected = reference(x, time, context).sample
    torch.testing.assert_close(ours(x, time, ours.read(context)), expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_draws_the_same_with_it() -> None:
    model = latent_diffusion()
    settings = {"steps": 3, "guidance": 4.0}
    plain = text_to_image(model, ["a red circle"], **settings, generator=torch.Generator().manual_seed(0))
    fuse(model.unet)
    fused = text_to_image(model, ["a red circle"], **settings, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_adapters_are_refused_and_stay() -> None:
    unet, _ = unets()
    attach_lora(unet, LoraConfig(r=2, targets=ATTENTION), seed=0)
    before = list(unet.state_dict())
    with pytest.raises(ValueError, match="merge them first"):
        fuse(unet)
    assert list(unet.state_dict()) == before
