import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DetrForSegmentation

from agents.vision import detr
from agents.vision.detection_score import evaluate_detector
from agents.vision.detr import DetrJobConfig
from agents.vision.detr_learner import DetrLearner, NetworkConfig, OptimizerConfig
from envs.vision.coco import CocoConfig
from envs.vision.coco_format import write_scenes
from envs.vision.example import Batch, HeldoutBatch, TrueSegments, collate
from envs.vision.scene_spec import KINDS
from envs.vision.scenes import SceneConfig
from envs.vision.sources import BatchLoader, DataConfig, SceneSource, make_source
from envs.vision.transforms import ResizeConfig
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.local_group import LocalGroup
from launch.run import ActorDied
from launch.run_directory import RunDirectory
from launch.runtime import Runtime
from models.detr.checkpoint import load_detr
from models.detr.detr import Detr, DetrOutput
from models.detr.loss import SetLossConfig
from models.errors import UserError
from tests.agents.runs import failing_at

SCENES = SceneConfig(size=64, max_objects=2)
NETWORK = NetworkConfig(depths=(1, 1, 1), hidden_sizes=(16, 32, 48), queries=6, d_model=32, heads=8, encoder_layers=1,
                        decoder_layers=2, ffn_dim=64)  # fmt: skip
SHORT = DetrJobConfig(
    network=NETWORK,
    data=DataConfig(SCENES, resize=ResizeConfig((48, 64), 100)),
    optimizer=OptimizerConfig(warmup=2),
    steps=6,
    batch_size=2,
    eval_images=3,
    eval_every=2,
    log_every=1,
)


def runtime(path: Path, name: str, seed: int = 0, resume: bool = False) -> Runtime:
    settings = RunConfig(name=name, runs_dir=path, seed=seed, backend="local", keep_checkpoints=10)
    if resume:
        directory = RunDirectory.open(path, name)
        return Runtime("detr", settings, directory, CheckpointStore(directory.checkpoints, 10).newest())
    return Runtime("detr", settings, RunDirectory.create(path, name, {"job": "detr"}))


def train(config: DetrJobConfig, path: Path, name: str, **options: Any) -> dict[str, float]:
    run = runtime(path, name, **options)
    try:
        detr.train(config, run)
    finally:
        run.close()
    return json.loads((path / name / "summary.json").read_text())["metrics"]


def final_state(path: Path, name: str) -> dict[str, Any]:
    checkpoint = CheckpointStore(path / name / "checkpoints", 10).newest()
    assert checkpoint is not None
    return checkpoint.load()


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def history(path: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


class Killed(BaseException):
    pass


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = replace(SHORT, network=replace(NETWORK, masks=True, dropout=0.1))
    train(config, tmp_path, "whole")
    run = runtime(tmp_path, "cut")
    log = run.log

    def log_until_killed(step: int, *args: Any) -> None:
        if step == 5:
            raise Killed
        log(step, *args)

    run.log = log_until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        detr.train(config, run)
    run.close()
    assert final_state(tmp_path, "cut")["step"] == 4
    train(config, tmp_path, "cut", resume=True)
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    assert history(tmp_path, "cut") == history(tmp_path, "whole")
    assert {"eval/AP", "eval/PQ", "eval/PQ_stuff"} <= history(tmp_path, "whole")[-1].keys()
    peer = DetrForSegmentation.from_pretrained(tmp_path / "whole" / "model" / "final")
    assert peer.config.id2label[0] == "circle"


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(replace(SHORT, steps=2), tmp_path, name, seed=seed)
    assert_equal(final_state(tmp_path, "a")["net"], final_state(tmp_path, "b")["net"])
    differ = [final_state(tmp_path, name)["net"]["net.class_embed.weight"] for name in "ac"]
    assert not torch.equal(*differ)


def test_a_folder_of_coco_and_a_trained_model_serve_too(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("heldout", 3)):
        write_scenes(tmp_path / "coco", SCENES, seed=0, count=count, split=split)  # type: ignore[arg-type]
    coco = CocoConfig(tmp_path / "coco", "train", panoptic=True)
    data = replace(SHORT.data, coco=coco, heldout_split="heldout")
    config = replace(SHORT, data=data, network=replace(NETWORK, masks=True))
    figures = train(config, tmp_path, "first")
    assert {"eval/AP", "eval/PQ"} <= figures.keys()
    start = tmp_path / "first" / "model" / "final"
    config = replace(config, network=NetworkConfig())  # masks are what the model has
    assert {"eval/AP", "eval/PQ"} <= train(replace(config, model=start, steps=1), tmp_path, "second").keys()
    # Things alone: the classes of the backgrounds are left out of the detector.
    things = replace(data, coco=replace(coco, panoptic=False))
    train(replace(config, model=start, data=things, steps=1), tmp_path, "third")
    assert load_detr(tmp_path / "third" / "model" / "final").config.labels == KINDS
    with pytest.raises(UserError, match=r"knows no label 'plain background', which the data has \(5 such"):
        train(replace(config, model=tmp_path / "third" / "model" / "final"), tmp_path, "fourth")


def coco_folder(path: Path, masks: bool = False) -> DetrJobConfig:
    """Five scenes to train on, four held out, as a folder; and the job on it."""
    for split, count in (("train", 5), ("heldout", 4)):
        write_scenes(path / "coco", SCENES, seed=0, count=count, split=split)  # type: ignore[arg-type]
    coco = CocoConfig(path / "coco", "train", panoptic=masks)
    data = replace(SHORT.data, coco=coco, heldout_split="heldout")
    return replace(SHORT, data=data, eval_images=4, network=replace(NETWORK, masks=masks))


def test_a_mask_head_is_added_to_a_trained_box_model(tmp_path: Path) -> None:
    boxes = replace(SHORT, steps=2)
    assert "eval/PQ" not in train(boxes, tmp_path, "boxes")
    start = tmp_path / "boxes" / "model" / "final"
    config = replace(boxes, model=start, network=NetworkConfig(masks=True))
    assert "eval/PQ" in train(config, tmp_path, "masks")
    assert load_detr(tmp_path / "masks" / "model" / "final").config.mask_head
    names = SceneSource(SCENES, 0, "train").names
    pupil, again = (
        DetrLearner(start, names, config.network, SetLossConfig(), OptimizerConfig(), 2, 0, "cpu") for _ in range(2)
    )
    assert_equal(dict(pupil.net.state_dict()), dict(again.net.state_dict()))
    kept = load_detr(start).state_dict()
    assert_equal({name: pupil.net.state_dict()[name] for name in kept}, dict(kept))
    with pytest.raises(UserError, match=r"--network\.d-model is of no use beside --model"):
        replace(config, network=replace(config.network, d_model=64))


def test_dilation_is_of_a_model() -> None:
    with pytest.raises(UserError, match=r"--dilation is of the \.pth"):
        replace(SHORT, dilation=True)


def skipping(config: DetrJobConfig) -> DetrJobConfig:
    return replace(config, data=replace(config.data, coco=replace(config.data.coco, on_bad="skip")))


class Oracle(Detr):
    """Answers with the truth, whatever it is shown."""

    def __init__(self, answer: DetrOutput) -> None:
        torch.nn.Module.__init__(self)
        self.answer = answer

    def forward(
        self, images_BCHW: torch.Tensor, valid_BHW: torch.Tensor | None = None, masks: bool = True
    ) -> DetrOutput:
        return self.answer


def test_heldout_images_that_cannot_be_read_are_left_out_of_batches_and_truth(tmp_path: Path) -> None:
    config = skipping(coco_folder(tmp_path))
    for number in (0, 1, 3):  # the first batch of two is none at all
        (tmp_path / "coco" / "heldout" / f"{number:012d}.png").write_bytes(b"no picture")
    loader = BatchLoader(config.data, 0, 2, masks=False)
    found = [loader.heldout_batch(first, 2) for first in (0, 2)]
    assert [(h.numbers, h.batch is None) for h in found] == [([], True), ([2], False)]
    assert found[1].batch is not None
    targets = found[1].batch.to_device("cpu").targets
    logits = torch.nn.functional.one_hot(targets.labels_BT, 17).float() * 20
    oracle = Oracle(DetrOutput(logits[None], targets.boxes_BT4[None]))
    source = make_source(config.data, 0, heldout=True)
    assert evaluate_detector(oracle, found, source, 4, "cpu")["eval/AP"] == pytest.approx(1)
    assert "eval/AP" in train(config, tmp_path, "run")
    with pytest.raises(UserError, match="none of 2 held-out images can be read"):
        evaluate_detector(oracle, found[:1], source, 2, "cpu")


@pytest.mark.parametrize(("split", "saved"), [("heldout", 3), ("train", 1)])
def test_an_image_that_ends_the_run_ends_it_after_a_checkpoint(split: str, saved: int, tmp_path: Path) -> None:
    config = replace(coco_folder(tmp_path), loaders=1)
    # Of the training images, the first of the second batch.
    number = 1 if split == "heldout" else BatchLoader(config.data, 0, 2, masks=False)._index(5, 2)
    image = tmp_path / "coco" / split / f"{number:012d}.png"
    whole = image.read_bytes()
    image.write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"{image.name}: not an image"):
        train(replace(config, eval_every=3), tmp_path, "cut")
    assert final_state(tmp_path, "cut")["step"] == saved
    image.write_bytes(whole)
    train(replace(config, eval_every=3), tmp_path, "cut", resume=True)
    train(replace(config, eval_every=3), tmp_path, "whole")
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))


def test_loaders_that_keep_dying_end_the_run_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = LocalGroup.call

    def dying(group: LocalGroup, index: int, method: str, *args: Any, **options: Any) -> Any:
        if (method, args) != ("train_batch", (3,)):
            return call(group, index, method, *args, **options)
        lost: Future[None] = Future()
        lost.set_exception(ActorDied("loader-1 died"))
        return lost

    monkeypatch.setattr(LocalGroup, "call", dying)
    with pytest.raises(UserError, match="loader-1 died"):
        train(replace(SHORT, eval_every=9), tmp_path, "run")
    assert final_state(tmp_path, "run")["step"] == 3


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_resumed_run_begins_with_the_evaluation_that_failed(
    evaluation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as one in which none did, line by line: also if it was the last."""
    config = replace(SHORT, steps=4)
    figures = train(config, tmp_path, "whole")
    monkeypatch.setattr(detr, "evaluation", failing_at(evaluation, detr.evaluation, UserError("broken")))
    with pytest.raises(UserError, match="broken"):
        train(config, tmp_path, "cut")
    again = train(config, tmp_path, "cut", resume=True)
    assert {k: v for k, v in again.items() if "eval" in k} == {k: v for k, v in figures.items() if "eval" in k}
    assert history(tmp_path, "cut") == history(tmp_path, "whole")
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))


def test_images_without_things_have_no_ap(tmp_path: Path) -> None:
    empty = replace(SHORT, data=DataConfig(replace(SCENES, min_objects=0, max_objects=0)), steps=2)
    figures = train(empty, tmp_path, "scenes")
    assert "eval/quality" in figures
    assert "eval/AP" not in figures
    config = replace(coco_folder(tmp_path), steps=2)
    file = tmp_path / "coco" / "annotations" / "instances_heldout.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    assert "eval/AP" not in train(config, tmp_path, "folder")
    assert (tmp_path / "scenes" / "model" / "final").is_dir()


def test_evaluate_scores_the_averaged_weights_of_the_checkpoint(tmp_path: Path) -> None:
    train(SHORT, tmp_path, "run")
    run = runtime(tmp_path, "run", resume=True)
    detr.evaluate(SHORT, run)
    run.close()
    before, after = history(tmp_path, "run")[-2:]
    assert {k: v for k, v in after.items() if k.startswith("eval")} == {
        k: v for k, v in before.items() if k.startswith("eval")
    }
    fresh = runtime(tmp_path, "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        detr.evaluate(SHORT, fresh)
    fresh.close()


def batches(source: SceneSource, first: int, count: int) -> Batch:
    return collate([source.example(i) for i in range(first, first + count)])


def heldout(batch: Batch) -> list[HeldoutBatch]:
    """As the first held-out batch, of scenes."""
    assert batch.ids_BHW is not None
    labels = [batch.labels_BT[i, valid].tolist() for i, valid in enumerate(batch.valid_BT)]
    segments = [TrueSegments(ids, dict(enumerate(of, start=1))) for ids, of in zip(batch.ids_BHW, labels)]
    return [HeldoutBatch(list(range(len(batch.sizes_B2))), batch, segments)]


def learner(**settings: Any) -> DetrLearner:
    optimizer = OptimizerConfig(lr=2e-3, backbone_lr=2e-3, warmup=10, ema_decay=0.9, **settings)
    source = SceneSource(SCENES, 0, "train")
    return DetrLearner(
        None, source.names, replace(NETWORK, masks=True, d_model=64), SetLossConfig(), optimizer, 150, 0, "cpu"
    )


def test_it_learns_four_scenes_by_heart() -> None:
    source = SceneSource(SCENES, 0, "train")
    batch = batches(source, 0, 4)
    pupil = learner()
    before = evaluate_detector(pupil.averaged, heldout(batch), source, 4, "cpu")
    for _ in range(150):
        pupil.update(batch, want_metrics=False)
    after = evaluate_detector(pupil.averaged, heldout(batch), source, 4, "cpu")
    assert before["eval/AP50"] < 0.1
    assert after["eval/AP50"] > 0.9
    assert after["eval/PQ"] > 0.2


def test_a_loss_that_is_not_finite_is_refused() -> None:
    pupil = learner()
    with torch.no_grad():
        pupil.net.class_embed.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite at step 1"):
        pupil.update(batches(SceneSource(SCENES, 0, "train"), 0, 2), want_metrics=True)


def test_the_average_follows_the_weights() -> None:
    pupil = learner()
    start = pupil.averaged.class_embed.weight.clone()
    pupil.update(batches(SceneSource(SCENES, 0, "train"), 0, 2), want_metrics=False)
    expected = start.lerp(pupil.net.class_embed.weight, 1 - 1 / 10)  # the first decay is 1/10
    torch.testing.assert_close(pupil.averaged.class_embed.weight, expected)
    assert not pupil.averaged.training


def torchvision_resnet50(inner: int = 8) -> dict[str, torch.Tensor]:
    """A state dict under the names of torchvision's resnet50, written from its definition, `inner` for its 64 channels.
    torchvision's norms hold what they learned, here noise."""

    def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
        parts = {f"{name}.{part}": torch.randn(channels) for part in ("weight", "bias", "running_mean")}
        return parts | {
            f"{name}.running_var": torch.rand(channels) + 0.5,
            f"{name}.num_batches_tracked": torch.tensor(9),
        }

    state = {"conv1.weight": torch.randn(inner, 3, 7, 7), **norm("bn1", inner)}
    inputs = inner
    for stage, depth in enumerate((3, 4, 6, 3), start=1):
        width = inner * 2 ** (stage - 1)
        for block in range(depth):
            at = f"layer{stage}.{block}"
            shapes = (width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)
            for i, shape in enumerate(shapes, start=1):
                state |= {f"{at}.conv{i}.weight": 0.1 * torch.randn(shape), **norm(f"{at}.bn{i}", shape[0])}
            if block == 0:
                state[f"{at}.downsample.0.weight"] = 0.1 * torch.randn(4 * width, inputs, 1, 1)
                state |= norm(f"{at}.downsample.1", 4 * width)
            inputs = 4 * width
    return {**state, "fc.weight": torch.randn(1000, inputs), "fc.bias": torch.randn(1000)}


def test_a_backbone_of_torchvision_keeps_its_weights_and_norms(tmp_path: Path) -> None:
    state = torchvision_resnet50()
    assert len(state) == 320  # as torchvision's resnet50 has
    torch.save(state, tmp_path / "resnet50.pth")
    save_file(state, tmp_path / "resnet50.safetensors")
    names = SceneSource(SCENES, 0, "train").names
    plain = NetworkConfig(queries=6, d_model=32, encoder_layers=1, decoder_layers=1, ffn_dim=64)
    for file in ("resnet50.pth", "resnet50.safetensors"):
        network = replace(plain, backbone_weights=tmp_path / file)
        pupil = DetrLearner(None, names, network, SetLossConfig(), OptimizerConfig(), 2, 0, "cpu")
        held = {n: t for n, t in state.items() if not n.startswith("fc.") and not n.endswith("tracked")}
        assert_equal(dict(pupil.net.backbone.state_dict()), held)
    pupil.update(batches(SceneSource(SCENES, 0, "train"), 0, 2), want_metrics=False)
    trained = pupil.net.backbone.state_dict()
    assert not torch.equal(trained["layer4.2.conv1.weight"], state["layer4.2.conv1.weight"])
    for part in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(trained[f"bn1.{part}"], state[f"bn1.{part}"])


def test_a_backbone_that_does_not_fit_is_named(tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        network = replace(NetworkConfig(backbone_weights=tmp_path / "resnet.pth"), **changes)
        with pytest.raises(UserError, match=message):
            DetrLearner(None, ("a",), network, SetLossConfig(), OptimizerConfig(), 2, 0, "cpu")

    refused("no such file of backbone weights")
    state = torchvision_resnet50()
    torch.save(state, tmp_path / "resnet.pth")
    refused(r"a bottleneck ResNet of depths \[3, 4, 6, 3\] and widths \[32, 64, 128, 256\]", depths=(2, 2, 2, 2))
    torch.save({n: t for n, t in state.items() if n != "layer3.2.bn2.bias"}, tmp_path / "resnet.pth")
    refused("tensor layer3.2.bn2.bias is missing")
    torch.save(state | {"layer1.0.conv2.weight": torch.zeros(8, 2, 3, 3)}, tmp_path / "resnet.pth")  # a ResNeXt's
    refused(r"layer1.0.conv2.weight has shape \[8, 2, 3, 3\]")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    refused("tensor conv1.weight is missing; is it a ResNet of torchvision")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0: must be positive"),
        ({"batch_size": -1}, "--batch-size is -1"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SHORT, **change)
    with pytest.raises(UserError, match=r"--optimizer\.ema-decay is 1"):
        OptimizerConfig(ema_decay=1)
    for settings in ({"queries": 0}, {"heads": 0}, {"d_model": -4}, {"dropout": 2.0}):
        name, value = next(iter(settings.items()))
        with pytest.raises(UserError, match=rf"--network\.{name.replace('_', '-')} is {value}: must be"):
            NetworkConfig(**settings)  # type: ignore[arg-type]
