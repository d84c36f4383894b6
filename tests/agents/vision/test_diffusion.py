"""The diffusion job on tiny networks: it learns, resumes bit for bit, and leaves a folder behind."""

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from agents.vision.diffusion import DiffusionConfig, evaluate, load_images, start_loaders, train
from agents.vision.diffusion_config import LearningConfig, NetworkConfig
from envs.vision.captioned import CaptionedConfig, make_captioned
from envs.vision.coco import CocoConfig
from envs.vision.coco_format import write_scenes
from envs.vision.scenes import SceneConfig
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.local_group import LocalGroup
from launch.run import ActorDied
from launch.run_directory import RunDirectory
from launch.runtime import EvaluationRuntime, Runtime
from models.diffusion.folder import load_folder
from models.errors import UserError

TINY = DiffusionConfig(
    data=CaptionedConfig(SceneConfig(size=32, max_objects=2), images=64, heldout_images=8),
    network=NetworkConfig(
        autoencoder_widths=(16, 16, 16), unet_widths=(16, 32), heads=2, text_width=16, text_layers=1, vocab_size=600
    ),
    learning=LearningConfig(autoencoder_steps=15, autoencoder_batch_size=4, steps=25, batch_size=16, warmup=2),
    loaders=1,
    sample_steps=2,
    samples=2,
    eval_every=20,
    log_every=5,
)


def start(runs: Path, name: str, config: DiffusionConfig, resume: bool = False) -> RunDirectory:
    directory = RunDirectory(runs / name) if resume else RunDirectory.create(runs, name, {"job": "diffusion"})
    checkpoint = CheckpointStore(directory.checkpoints, 9).newest() if resume else None
    run = Runtime("diffusion", RunConfig(backend="local", keep_checkpoints=9), directory, checkpoint)
    try:
        train(config, run)
        run.finish("finished")
    finally:
        run.close()
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return start(tmp_path_factory.mktemp("runs"), "whole", TINY)


def logged(directory: RunDirectory, name: str) -> list[float]:
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_both_phases_learn(finished: RunDirectory) -> None:
    errors, losses = logged(finished, "autoencoder/error"), logged(finished, "eval/denoising_loss")
    assert errors[-1] < 0.9 * errors[0]
    assert losses[-1] < 0.95 * losses[0]


def test_latents_have_unit_variance(finished: RunDirectory) -> None:
    model = load_folder(finished.root / "model" / "final")
    source = make_captioned(TINY.data, seed=0, heldout=False)
    images = torch.from_numpy(np.stack([source.example(i)[0] for i in range(64)]))
    latents = model.encode_images(images.permute(0, 3, 1, 2) / 255)
    assert float(latents.std()) == pytest.approx(1, abs=0.1)


def test_what_is_left_behind(finished: RunDirectory) -> None:
    summary = json.loads(finished.summary.read_text())
    assert summary["status"] == "finished"
    assert {"eval/psnr", "eval/denoising_loss"} <= set(summary["metrics"])
    assert (finished.images / "40-samples.png").is_file()
    assert (finished.images / "15-reconstructions.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(finished.root / "model" / "final", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(["a red circle"], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("killed_after", [15, 20], ids=["between the phases", "denoiser"])
def test_resume_repeats_the_uninterrupted_run(finished: RunDirectory, tmp_path: Path, killed_after: int) -> None:
    class Killed(Exception):
        pass

    directory = RunDirectory.create(tmp_path, "cut", {"job": "diffusion"})
    run = Runtime("diffusion", RunConfig(backend="local", keep_checkpoints=9), directory)
    save = run.save

    def save_and_die(step: int, state: dict, score: float | None = None) -> None:
        save(step, state, score)
        if step == killed_after:
            raise Killed

    run.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(TINY, run)
    run.close()
    start(tmp_path, "cut", TINY, resume=True)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = (d.root / "model" / "final" / f"{part}.safetensors" for d in (directory, finished))
        assert ours.read_bytes() == theirs.read_bytes()


def test_evaluation_of_a_checkpoint(finished: RunDirectory) -> None:
    before = finished.summary.read_text()
    checkpoint = CheckpointStore(finished.checkpoints, 9).newest()
    run = EvaluationRuntime("diffusion", RunConfig(backend="local"), finished, checkpoint)
    evaluate(TINY, run)
    run.finish("finished")
    run.close()
    assert finished.summary.read_text() == before
    found = json.loads(finished.evaluations.read_text())
    figures = {name: value for name, value in json.loads(before)["metrics"].items() if name.startswith("eval/")}
    assert {name: found[name] for name in figures} == figures


def test_a_coco_folder_in_place_of_scenes(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        write_scenes(tmp_path, SceneConfig(size=48), seed=1, count=4, split=split)
    config = CaptionedConfig(SceneConfig(size=32), CocoConfig(tmp_path))
    source = make_captioned(config, seed=0, heldout=True)
    assert len(source) == 4
    image, caption = source.example(3)
    assert image.shape == (32, 32, 3)
    assert caption.endswith("background")
    (tmp_path / "annotations/captions_val2017.json").unlink()
    with pytest.raises(UserError, match="no image has a caption"):
        make_captioned(config, seed=0, heldout=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: replace(TINY, data=replace(TINY.data, scenes=SceneConfig(size=34))), "multiple of 4"),
        (lambda: NetworkConfig(unet_widths=(20,)), "unet-widths"),
        (lambda: NetworkConfig(heads=5), "5 heads"),
        (lambda: NetworkConfig(heads=16, text_width=40), "text-width is 40: give a multiple of --network.heads 16"),
        (lambda: NetworkConfig(prompt_length=1), "prompt-length is 1: start and end"),
        (lambda: LearningConfig(caption_dropout=1.0), "caption-dropout"),
        (lambda: LearningConfig(steps=0), "learning.steps"),
        (lambda: CaptionedConfig(images=0), "data.images"),
    ],
)
def test_settings_that_cannot_be(change, named: str) -> None:
    with pytest.raises(UserError, match=named):
        change()


def test_a_loader_that_dies_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over each of its calls once, that for the number of images too; and one that always dies is one line."""
    call, lost = LocalGroup.call, set()

    def dying(group: LocalGroup, index: int, *call_of: Any, **options: Any) -> Any:
        if always or call_of not in lost:
            lost.add(call_of)
            future: Future[None] = Future()
            future.set_exception(ActorDied("loader-0 died"))
            return future
        return call(group, index, *call_of, **options)

    monkeypatch.setattr(LocalGroup, "call", dying)
    always = False
    run = Runtime("diffusion", RunConfig(backend="local"), RunDirectory.create(tmp_path, "run", {"job": "diffusion"}))
    images = load_images(TINY, start_loaders(TINY, run), heldout=True)
    assert len(images.captions) == 8
    assert {method for method, *_ in lost} == {"count", "load"}
    always = True
    with pytest.raises(UserError, match="loader-0 died"):
        load_images(TINY, start_loaders(TINY, run), heldout=True)
    run.close()


def test_a_diverging_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite.*--learning\.autoencoder-lr"):
        start(tmp_path, "wild", replace(TINY, learning=replace(TINY.learning, autoencoder_lr=1e20)))
