import pytest
import torch

from models.detr.config import DetrConfig, ResNetConfig
from models.detr.detr import IMAGE_MEAN, IMAGE_STD, Detr, normalise_images
from models.detr.position import sine_position
from models.detr.resnet import ResNet, fold_batch_norms
from models.errors import UserError
from tests.models.detr.small import SMALL, resnet_with_statistics


def test_padding_changes_nothing() -> None:
    """An image gives the same answers alone and in a batch with a larger one: padding is neither seen nor counted."""
    torch.manual_seed(0)
    model = Detr(SMALL).eval()
    small, large = torch.randn(3, 64, 80), torch.randn(3, 96, 112)
    batch = torch.zeros(2, 3, 96, 112)
    batch[0, :, :64, :80], batch[1] = small, large
    valid = torch.zeros(2, 96, 112, dtype=torch.bool)
    valid[0, :64, :80] = valid[1] = True
    with torch.no_grad():
        together, alone = model(batch, valid), model(small[None])
    # The convolutions see zeros beyond the border either way, so the encoder's answer is the same.
    torch.testing.assert_close(together.boxes_BQ4[:1], alone.boxes_BQ4, atol=2e-3, rtol=0)
    changed = batch.clone()
    changed[0, :, :64, :40] += 1
    with torch.no_grad():
        assert (model(changed, valid).boxes_BQ4[0] - together.boxes_BQ4[0]).abs().max() > 2e-3


def test_positions_do_not_depend_on_padding() -> None:
    valid = torch.zeros(1, 6, 8, dtype=torch.bool)
    valid[:, :4, :5] = True
    padded = sine_position(valid, 16, torch.float32)[:, :4, :5]
    torch.testing.assert_close(padded, sine_position(torch.ones(1, 4, 5, dtype=torch.bool), 16, torch.float32))
    assert len(padded.flatten(0, 2).unique(dim=0)) == 20  # each cell has its own


def test_folded_batch_norms_compute_the_same() -> None:
    resnet, images = resnet_with_statistics(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = resnet(images)
        fold_batch_norms(resnet)
        after = resnet(images)
    assert not any("running_var" in name for name, _ in resnet.named_buffers())
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_learning_batch_norm_becomes_frozen_batch_norm() -> None:
    torch.manual_seed(0)
    learning, frozen = ResNet(SMALL.backbone, frozen=False), ResNet(SMALL.backbone)
    learning.train()(torch.randn(4, 3, 64, 64))
    state = {name: tensor for name, tensor in learning.state_dict().items() if "num_batches" not in name}
    frozen.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    for a, b in zip(learning.eval()(images), frozen.train()(images)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not any("bn" in name for name, _ in frozen.named_parameters())


def test_dilation_keeps_the_resolution() -> None:
    plain, dilated = (ResNet(ResNetConfig("bottleneck", (1, 2, 2), (16, 16, 16), 8, dilation=d)) for d in (False, True))
    images = torch.randn(1, 3, 64, 64)
    assert [f.shape[-1] for f in plain(images)] == [16, 8, 4]
    assert [f.shape[-1] for f in dilated(images)] == [16, 8, 8]
    assert plain.state_dict().keys() <= dilated.state_dict().keys()


def test_images_are_normalised_as_imagenet_is() -> None:
    images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    images[0, 0, 0] = torch.tensor([255, 124, 104])
    found = normalise_images(images)[0, :, 0, 0]
    expected = [(1 - 0.485) / 0.229, (124 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 30}, "d_model 30 must be divisible"),
        ({"mask_head": True, "d_model": 48}, "d_model 48 gives the mask head no whole groups"),
        ({"labels": ("one",)}, "1 label names for 91 labels"),
        ({"mask_head": True, "backbone": ResNetConfig("basic", (1, 1), (8, 8), 8)}, "at least 3 stages"),
    ],
)
def test_shapes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetrConfig(**change)
    with pytest.raises(UserError, match="one positive depth"):
        ResNetConfig(depths=(1,), hidden_sizes=(8, 8))


def test_autocast_leaves_the_heads_in_float32() -> None:
    torch.manual_seed(0)
    model, images = Detr(SMALL).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    assert output.boxes_LBQ4.dtype == output.logits_LBQC.dtype == torch.float32
    torch.testing.assert_close(output.boxes_BQ4, model(images).boxes_BQ4, atol=0.02, rtol=0)


def test_what_normalises_images_is_made_once_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made of a list is copied to the GPU while the host waits for all that was asked of it before."""
    images = torch.randint(256, (2, 4, 6, 3), dtype=torch.uint8)
    first = normalise_images(images)
    mean, std = torch.tensor(IMAGE_MEAN)[:, None, None], torch.tensor(IMAGE_STD)[:, None, None]
    torch.testing.assert_close(first, (images.permute(0, 3, 1, 2) / 255 - mean) / std)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(normalise_images(images), first)


def test_boxes_can_be_had_without_masks() -> None:
    torch.manual_seed(0)
    model, images = Detr(SMALL).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole, boxes = model(images), model(images, masks=False)
    assert whole.masks_BQHW is not None
    assert boxes.masks_BQHW is None
    assert torch.equal(boxes.boxes_BQ4, whole.boxes_BQ4)
