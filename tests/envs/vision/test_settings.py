import pytest

from envs.vision.settings import DEVICE_VARIABLE, SPLIT_VARIABLE, vision_device, vision_split
from models.errors import UserError


def test_what_is_given_comes_before_the_variable_and_that_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DEVICE_VARIABLE, SPLIT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert (vision_device(None), vision_split(None)) == ("cpu", "train")
    monkeypatch.setenv(SPLIT_VARIABLE, "heldout")
    assert vision_split(None) == "heldout"
    assert vision_split("train") == "train"


def test_bad_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    with pytest.raises(UserError, match="--backend local"):
        vision_device(None)
    monkeypatch.setenv(DEVICE_VARIABLE, "gpu")
    with pytest.raises(UserError, match="must be cpu or cuda"):
        vision_device(None)
    monkeypatch.setenv(SPLIT_VARIABLE, "val")
    with pytest.raises(UserError, match="must be train or heldout"):
        vision_split(None)
