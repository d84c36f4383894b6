"""The ddpo job on a tiny model: it learns what pays, resumes bit for bit, and outlives bad rewards."""

import itertools
import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

from agents.vision import ddpo
from agents.vision.ddpo import DDPOConfig, evaluate, load_prompts, start_scorer, train
from agents.vision.ddpo_learner import DDPOLearner
from agents.vision.ddpo_sampler import sample
from envs.vision import shipped_weights
from envs.vision.custom_reward import RewardFailed
from envs.vision.scenes import SceneConfig
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.local_group import LocalGroup
from launch.run import ActorDied
from launch.run_directory import RunDirectory
from launch.runtime import EvaluationRuntime, Runtime
from models.diffusion.folder import load_folder, save_folder
from models.diffusion.lora import WEIGHTS, load_lora
from models.errors import UserError
from tests.agents.runs import failing_at
from tests.models.diffusion.small_models import tiny_latent_diffusion

HERE = "tests.agents.vision.rewards"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_folder(tiny_latent_diffusion(), folder)
    return folder


@pytest.fixture
def tiny(model: Path) -> DDPOConfig:
    return DDPOConfig(
        model=model, reward=f"{HERE}:brightness", scenes=SceneConfig(size=64, max_objects=1), scene_prompts=2,
        iterations=3, samples=4, batch_size=2, updates=2, steps=2, guidance=2.0, eval_images=2, eval_every=2, lr=1e-3,
    )  # fmt: skip


def start(
    runs: Path, config: DDPOConfig, name: str = "run", resume: bool = False, backend: str = "local"
) -> RunDirectory:
    directory = RunDirectory(runs / name) if resume else RunDirectory.create(runs, name, {"job": "ddpo"})
    checkpoint = CheckpointStore(directory.checkpoints, 9).newest() if resume else None
    settings = RunConfig(backend=backend, keep_checkpoints=9)  # type: ignore[arg-type]
    run = Runtime("ddpo", settings, directory, checkpoint)
    try:
        train(config, run)
        run.finish("finished")
    finally:
        run.close()
    return directory


def logged(directory: RunDirectory, name: str) -> list[float]:
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("estimator", ["is", "sf"])
@pytest.mark.parametrize("lora_r", [0, 4], ids=["full", "lora"])
def test_an_update_makes_what_paid_more_likely(tiny: DDPOConfig, estimator: Literal["is", "sf"], lora_r: int) -> None:
    config = replace(
        tiny, estimator=estimator, lora_r=lora_r, updates=1, samples=8, batch_size=4, steps=3, lr=1e-5, clip_range=0.1,
        statistics_min_count=1,
    )  # fmt: skip
    learner = DDPOLearner(config, seed=0, device="cpu")
    rollout, _ = learner.sample(["a red circle"] * 8, torch.Generator().manual_seed(0))
    rewards = np.random.default_rng(0).normal(size=8)
    learner.update(rollout, rewards)
    with torch.no_grad():
        after_NS = learner.log_probs(rollout, torch.arange(8), range(3)).T
    gain_N = (after_NS - rollout.log_probs_NS).sum(dim=1)
    assert float((gain_N * torch.from_numpy(rewards - rewards.mean())).sum()) > 0


def test_the_first_update_is_on_policy(tiny: DDPOConfig) -> None:
    learner = DDPOLearner(replace(tiny, updates=1, batch_size=4, steps=3), seed=0, device="cpu")
    rollout, images = learner.sample(["a red circle"] * 4, torch.Generator().manual_seed(0))
    assert rollout.latents_NSZhw.shape == (4, 4, 4, 8, 8)
    assert images.shape == (4, 3, 16, 16)
    figures = learner.update(rollout, torch.arange(4.0).numpy())
    assert figures["train/approx_kl"] < 1e-10
    assert figures["train/clip_fraction"] == 0
    assert figures["train/loss"] == pytest.approx(0, abs=1e-5)  # advantages have zero mean
    assert learner.update(rollout, torch.arange(4.0).numpy())["train/approx_kl"] > 1e-10


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_taken_together_make_the_same_update(tiny: DDPOConfig, guidance: float) -> None:
    changes, figures = [], []
    for at_once in (1, 2, 5):
        config = replace(tiny, steps=5, guidance=guidance, steps_at_once=at_once, statistics_min_count=1)
        learner = DDPOLearner(config, seed=0, device="cpu")
        rollout, _ = learner.sample(["a red circle"] * 4, torch.Generator().manual_seed(0))
        before = parameters_to_vector(learner.trained.values()).detach().clone()
        figures.append([learner.update(rollout, np.array([0.0, 1.0, 3.0, -1.0])) for _ in range(2)])
        changes.append(parameters_to_vector(learner.trained.values()).detach() - before)
    for change, numbers in zip(changes[1:], figures[1:]):
        assert (change - changes[0]).norm() < 1e-2 * changes[0].norm()
        assert numbers[0] == pytest.approx(figures[0][0], rel=1e-3, abs=1e-6)


def test_images_share_prompts(tiny: DDPOConfig) -> None:
    config = replace(tiny, samples=8, batch_size=4, images_per_prompt=4, updates=1, scene_prompts=64)
    learner = DDPOLearner(config, seed=0, device="cpu")
    run = SimpleNamespace(seed=0)
    asked: list[str] = []

    class Scorer:
        def call(self, index: int, name: str, images: np.ndarray, prompts: list[str], timeout_s: float) -> Any:
            asked.extend(prompts)
            return SimpleNamespace(result=lambda: np.zeros(len(prompts)))

    prompts, _ = load_prompts(config, 0)
    rollout, rewards = sample(config, run, learner, Scorer(), prompts)  # type: ignore[arg-type]
    assert rollout.prompts == asked == [asked[0]] * 4 + [asked[4]] * 4
    assert asked[0] != asked[4]
    assert len(rewards) == 8


def test_adapters_are_left_behind(tiny: DDPOConfig, tmp_path: Path) -> None:
    directory = start(tmp_path, tiny)
    assert (directory.root / "model" / "final" / WEIGHTS).is_file()
    tuned = load_folder(tiny.model).unet
    load_lora(tuned, directory.root / "model" / "final")
    learner = DDPOLearner(tiny, seed=0, device="cpu")
    learner.load_state(CheckpointStore(directory.checkpoints, 9).newest().load())
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, learner.model.unet.get_parameter(name))
    run = EvaluationRuntime(
        "ddpo", RunConfig(backend="local"), directory, CheckpointStore(directory.checkpoints, 9).newest()
    )
    evaluate(tiny, run)
    run.finish("finished")
    run.close()
    evaluated = json.loads(directory.evaluations.read_text())
    assert evaluated["eval/reward_mean"] == pytest.approx(logged(directory, "eval/reward_mean")[-1])
    metrics = json.loads(directory.summary.read_text())["metrics"]
    assert metrics["eval/before/reward_mean"] == pytest.approx(logged(directory, "eval/reward_mean")[0])


@pytest.mark.parametrize(("device", "reward", "expected"), [
    ("cuda", "scene-agreement", ("cuda", 0.1)), ("cpu", "scene-agreement", ("cpu", 0)),
    ("cuda", "jpeg-compressibility", ("cpu", 0)),
])  # fmt: skip
def test_a_detector_pays_where_the_diffusion_model_draws(
    tiny: DDPOConfig, device: str, reward: str, expected: tuple[str, float]
) -> None:
    asked: dict[str, Any] = {}

    class Run:
        def actors(self, cls: type, count: int, resources: dict[str, float], *args: Any, name: str) -> None:
            asked.update(device=args[-1], gpu=resources["gpu"])

    Run.device = device  # type: ignore[attr-defined]
    start_scorer(replace(tiny, reward=reward), Run())  # type: ignore[arg-type]
    assert (asked["device"], asked["gpu"]) == expected


def test_resume_repeats_the_uninterrupted_run(tiny: DDPOConfig, tmp_path: Path) -> None:
    whole = start(tmp_path, replace(tiny, iterations=4), "whole")
    start(tmp_path, replace(tiny, iterations=2), "cut")
    cut = start(tmp_path, replace(tiny, iterations=4), "cut", resume=True)
    assert_same(final_adapters(cut), final_adapters(whole))


def test_samplers_draw_what_the_learner_would(tiny: DDPOConfig, tmp_path: Path) -> None:
    """With a checkpoint after each iteration nothing is drawn ahead, and nothing differs."""
    config = replace(tiny, eval_every=1)
    alone = final_adapters(start(tmp_path, config, "alone"))
    assert_same(final_adapters(start(tmp_path, replace(config, sampler_workers=2), "actors")), alone)


def test_samplers_draw_with_the_weights_of_the_iteration_before(tiny: DDPOConfig, tmp_path: Path) -> None:
    """So the first update of an iteration is off-policy, but for the iterations after a start or a checkpoint."""
    config = replace(tiny, updates=1, iterations=5, eval_every=3, sampler_workers=1)
    moved = [change > 1e-10 for change in logged(start(tmp_path, config), "train/approx_kl")]
    assert moved == [False, True, True, False, True]


def test_a_resumed_run_with_samplers_repeats_the_uninterrupted_one(tiny: DDPOConfig, tmp_path: Path) -> None:
    config = replace(tiny, iterations=5, sampler_workers=2)
    whole = start(tmp_path, config, "whole")
    start(tmp_path, replace(config, iterations=2), "cut")
    cut = start(tmp_path, config, "cut", resume=True)
    assert_same(final_adapters(cut), final_adapters(whole))


def test_a_batch_whose_sampler_dies_is_drawn_again(tiny: DDPOConfig, tmp_path: Path) -> None:
    config = replace(tiny, iterations=2, eval_every=9, sampler_workers=2)
    deaths = iter([True, False, True, True, False])
    call = LocalGroup.call

    def dying(group: LocalGroup, index: int, method: str, *args: Any, **options: Any) -> Any:
        if method == "sample" and next(deaths, False):
            lost: Future[None] = Future()
            lost.set_exception(ActorDied("sampler-0 died"))
            return lost
        return call(group, index, method, *args, **options)

    whole = final_adapters(start(tmp_path, config, "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGroup, "call", dying)
        assert_same(final_adapters(start(tmp_path, config, "survivor")), whole)
    assert next(deaths, None) is None  # all of them came to pass


def test_a_run_whose_samplers_always_die_keeps_what_it_learned(
    tiny: DDPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = LocalGroup.call, itertools.count()

    def dying(group: LocalGroup, index: int, method: str, *args: Any, **options: Any) -> Any:
        if method == "sample" and next(calls) >= 4:  # the batches of two iterations
            lost: Future[None] = Future()
            lost.set_exception(ActorDied("sampler-0 died"))
            return lost
        return call(group, index, method, *args, **options)

    monkeypatch.setattr(LocalGroup, "call", dying)
    with pytest.raises(UserError, match=r"5 actors died .*: sampler-0 died; .* --sampler-timeout-s"):
        start(tmp_path, replace(tiny, eval_every=9, sampler_workers=1))
    assert CheckpointStore(RunDirectory(tmp_path / "run").checkpoints, 9).newest().step == 2


@pytest.mark.ray
def test_samplers_in_processes_of_their_own(tiny: DDPOConfig, tmp_path: Path) -> None:
    config = replace(tiny, sampler_workers=1, iterations=2, eval_every=9)
    ours = final_adapters(start(tmp_path, config, "ray", backend="ray"))
    here = final_adapters(start(tmp_path, config, "local"))
    for name, tensor in here.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def final_adapters(directory: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(directory.root / "model" / "final" / WEIGHTS)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        ("raises", "raised ZeroDivisionError: no scale"),
        ("not_a_number", "returned nan for the prompt 'a"),
        ("too_few", r"returned shape \(1,\) for 2 images"),
        ("NOT_A_FUNCTION", "is a int, not a function"),
        ("missing", "cannot be imported"),
    ],
)
def test_bad_rewards(tiny: DDPOConfig, tmp_path: Path, reward: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        start(tmp_path, replace(tiny, reward=f"{HERE}:{reward}"))


def test_nothing_is_lost_by_a_reward_that_fails_later(tiny: DDPOConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too late"):
        start(tmp_path, replace(tiny, reward=f"{HERE}:fails_later", iterations=9, eval_every=9))
    newest = CheckpointStore(RunDirectory(tmp_path / "run").checkpoints, 9).newest()
    assert newest.step == 2  # one batch of evaluation, two of each iteration: the third iteration's second call fails


@pytest.mark.parametrize("evaluation", [2, 3])
def test_a_resumed_run_begins_with_the_evaluation_that_failed(
    evaluation: int, tiny: DDPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is that before all iterations."""
    whole = start(tmp_path, tiny, "whole")
    monkeypatch.setattr(ddpo, "evaluation", failing_at(evaluation, ddpo.evaluation, RewardFailed("broken")))
    with pytest.raises(RewardFailed, match="broken"):
        start(tmp_path, tiny, "cut")
    cut = start(tmp_path, tiny, "cut", resume=True)
    for name in ("step", "train/reward_mean", "train/loss", "eval/reward_mean"):
        assert logged(cut, name) == logged(whole, name)
    assert cut.read_summary()["metrics"]["eval/reward_mean"] == logged(whole, "eval/reward_mean")[-1]
    assert_same(final_adapters(cut), final_adapters(whole))


@pytest.mark.ray
def test_a_reward_that_hangs(tiny: DDPOConfig, tmp_path: Path) -> None:
    config = replace(tiny, reward=f"{HERE}:hangs", reward_timeout_s=1.0, iterations=1)
    with pytest.raises(UserError, match="took over --reward-timeout-s 1 s"):
        start(tmp_path, config, backend="ray")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"estimator": "sf"}, "--estimator sf is right for the first update only"),
        ({"samples": 6}, "multiple of --batch-size 2 times --updates 2"),
        ({"images_per_prompt": 3}, "multiple of --images-per-prompt 3"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"estimator": "sf", "updates": 1, "sampler_workers": 1}, "they draw with older weights"),
        ({"sampler_workers": 3}, "--samples 4 are 2 batches of --batch-size 2"),
        ({"sampler_workers": -1}, "--sampler-workers is -1: must not be negative"),
    ],
)
def test_settings_that_cannot_be(tiny: DDPOConfig, changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        replace(tiny, **changes)


def test_prompts_of_a_file(tiny: DDPOConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n  \n")
    with pytest.raises(UserError, match="holds no prompt"):
        start(tmp_path, replace(tiny, prompts=prompts))
    with pytest.raises(UserError, match="cannot be read"):
        start(tmp_path, replace(tiny, prompts=tmp_path), "other")


def test_without_a_model_the_one_of_the_package_is_tuned(
    tiny: DDPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = DDPOLearner(replace(tiny, model=None, lora_r=4), seed=0, device="cpu")
    assert learner.model.unet.config.sample_size == 16
    monkeypatch.setattr(shipped_weights, "WEIGHTS", tmp_path)  # of an installation without any
    with pytest.raises(UserError, match=r"no diffusion model .*--model"):
        DDPOLearner(replace(tiny, model=None), seed=0, device="cpu")


def test_in_bfloat16_the_policy_that_learns_is_the_one_that_sampled(tiny: DDPOConfig) -> None:
    learner = DDPOLearner(replace(tiny, precision="bfloat16", steps=4), seed=0, device="cpu")
    rollout, _ = learner.sample(["a red square", "a blue star"], torch.Generator().manual_seed(0))
    assert rollout.log_probs_NS.dtype == torch.float32
    with torch.no_grad():
        again_SB = learner.log_probs(rollout, torch.arange(2), range(4))
    torch.testing.assert_close(again_SB.T, rollout.log_probs_NS, rtol=0, atol=1e-3)
    exact = DDPOLearner(replace(tiny, steps=4), seed=0, device="cpu")
    others, _ = exact.sample(["a red square", "a blue star"], torch.Generator().manual_seed(0))
    assert not torch.equal(others.latents_NSZhw, rollout.latents_NSZhw)
    assert {parameter.dtype for parameter in learner.trained.values()} == {torch.float32}
