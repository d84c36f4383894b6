import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from agents.vision import detr_rl
from agents.vision.detection_policy import answer_log_probs, leave_one_out, reinforce_loss, sample_answers
from agents.vision.detection_score import evaluate_detector
from agents.vision.detr_rl import DetectorTuner, DetrRLConfig
from envs.vision.answer_reward import AnswerScorer
from envs.vision.custom_reward import RewardFailed
from envs.vision.example import HeldoutBatch
from envs.vision.sources import DataConfig, SceneSource
from launch.checkpoint import CheckpointStore
from launch.config import RunConfig
from launch.jobs import find
from launch.local_group import LocalGroup
from launch.run_directory import RunDirectory
from launch.runtime import Runtime
from models.detr.checkpoint import save_detr
from models.errors import UserError
from tests.agents.runs import failing_at
from tests.agents.vision.test_detr import SCENES, assert_equal, batches, history, learner


def logits() -> Tensor:
    return torch.tensor(
        [[[0.3, -0.2, 0.5], [1.0, 0.1, -0.4]]], dtype=torch.float64
    ).requires_grad_()  # 1 image, 2 queries


def reward_of(labels: tuple[int, ...]) -> float:
    """Anything that does not decompose over queries."""
    return float(labels == (0, 2)) + 0.3 * (labels[0] == labels[1]) - 0.1 * labels[1]


def every_answer() -> Tensor:
    """Labels (9, 1, 2)."""
    return torch.tensor(list(itertools.product(range(3), repeat=2)))[:, None]


def exact_gradient() -> Tensor:
    """∇ Σ_y π(y) r(y), by summing over all nine answers."""
    leaf = logits()
    rewards = torch.tensor([reward_of(tuple(y[0].tolist())) for y in every_answer()])
    expected = (answer_log_probs(leaf, every_answer()).exp()[:, 0] * rewards).sum()
    return torch.autograd.grad(expected, leaf)[0]


def test_the_loss_in_expectation_is_minus_the_gradient_of_the_expected_reward() -> None:
    """Over all pairs of answers (K = 2), each weighted by its probability: the baseline biases nothing."""
    answers = every_answer()
    leaf = logits()
    log_probs = answer_log_probs(leaf, answers)[:, 0]
    rewards = torch.tensor([reward_of(tuple(y[0].tolist())) for y in answers])
    total = torch.zeros_like(leaf)
    for i, j in itertools.product(range(9), repeat=2):
        pair = torch.tensor([i, j])
        loss = reinforce_loss(log_probs[pair][:, None], leave_one_out(rewards[pair][:, None]))
        weight = log_probs[pair].sum().exp().detach()
        total += weight * torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    torch.testing.assert_close(-total, exact_gradient(), atol=1e-6, rtol=1e-5)


def test_log_probs_are_those_of_torch_distributions() -> None:
    predicted = torch.randn(2, 3, 4)
    answers = sample_answers(predicted, 5, torch.Generator().manual_seed(0))
    expected = Categorical(logits=predicted).log_prob(answers).sum(-1)
    torch.testing.assert_close(answer_log_probs(predicted, answers), expected)


def test_answers_are_drawn_as_often_as_their_probabilities_say() -> None:
    answers = sample_answers(logits(), 20_000, torch.Generator().manual_seed(0))
    frequencies = torch.stack([(answers[:, 0] == c).float().mean(0) for c in range(3)], -1)
    torch.testing.assert_close(frequencies, logits()[0].softmax(-1).float(), atol=0.015, rtol=0)


def test_leave_one_out() -> None:
    rewards = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([[-3.0, 0.0], [-1.5, 0.0], [4.5, 0.0]]))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a little on four scenes, so that rewards differ."""
    folder = tmp_path_factory.mktemp("detector")
    pupil = learner()
    batch = batches(SceneSource(SCENES, 0, "train"), 0, 4)
    for _ in range(60):
        pupil.update(batch, want_metrics=False)
    save_detr(pupil.averaged, folder)
    return folder


def config(detector: Path, **changes: Any) -> DetrRLConfig:
    plain = DetrRLConfig(model=detector, data=DataConfig(SCENES), steps=4, batch_size=2, samples=3, eval_images=4,
                         eval_every=2, log_every=1, loaders=1)  # fmt: skip
    return replace(plain, **changes)


def tuner(settings: DetrRLConfig) -> DetectorTuner:
    return DetectorTuner(settings, SceneSource(SCENES, 0, "train").names, 0, "cpu")


def scorer(reward: str = DetrRLConfig.reward) -> LocalGroup:
    source = SceneSource(SCENES, 0, "train")
    return LocalGroup(AnswerScorer, 1, (reward, [*source.stuff, len(source.names)]), {})


def test_tuning_raises_the_reward(detector: Path) -> None:
    """On the four scenes themselves; the detector knows them half."""
    subject = tuner(config(detector, samples=16, lr=3e-4))
    batch = batches(SceneSource(SCENES, 0, "train"), 0, 4)
    paying = scorer()
    rewards = [subject.update(batch, paying)["train/reward"] for _ in range(80)]
    before, after = np.mean(rewards[:10]), np.mean(rewards[-10:])
    assert before < 0.75
    assert after > before + 0.1


def runtime(path: Path, name: str, resume: bool = False, backend: Literal["local", "ray"] = "local") -> Runtime:
    settings = RunConfig(name=name, runs_dir=path, backend=backend, keep_checkpoints=10)
    if resume:
        directory = RunDirectory.open(path, name)
        return Runtime("detr-rl", settings, directory, CheckpointStore(directory.checkpoints, 10).newest())
    return Runtime("detr-rl", settings, RunDirectory.create(path, name, {"job": "detr-rl"}))


def final_state(path: Path, name: str) -> dict[str, Any]:
    checkpoint = CheckpointStore(path / name / "checkpoints", 10).newest()
    assert checkpoint is not None
    return checkpoint.load()


class Killed(BaseException):
    pass


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(detector: Path, tmp_path: Path) -> None:
    run = runtime(tmp_path, "whole")
    detr_rl.train(config(detector), run)
    run.close()
    run = runtime(tmp_path, "cut")
    log = run.log

    def log_until_killed(step: int, *args: Any) -> None:
        if step == 3:
            raise Killed
        log(step, *args)

    run.log = log_until_killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        detr_rl.train(config(detector), run)
    run.close()
    run = runtime(tmp_path, "cut", resume=True)
    detr_rl.train(config(detector), run)
    run.close()
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())["metrics"]
    assert {"eval/before/quality", "eval/quality"} <= summary.keys()
    assert (tmp_path / "cut" / "model" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("evaluation", [2, 3])
def test_a_resumed_run_begins_with_the_evaluation_that_failed(
    evaluation: int, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is that before all steps."""

    def train(name: str, resume: bool = False) -> None:
        run = runtime(tmp_path, name, resume)
        try:
            detr_rl.train(config(detector), run)
        finally:
            run.close()

    train("whole")
    monkeypatch.setattr(detr_rl, "evaluation", failing_at(evaluation, detr_rl.evaluation, UserError("broken")))
    with pytest.raises(UserError, match="broken"):
        train("cut")
    train("cut", resume=True)
    assert history(tmp_path, "cut") == history(tmp_path, "whole")
    assert_equal(final_state(tmp_path, "cut"), final_state(tmp_path, "whole"))


def test_evaluate_scores_the_checkpoint_and_boxes_are_drawn(detector: Path, tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    detr_rl.train(config(detector), run)
    run.close()
    run = runtime(tmp_path, "run", resume=True)
    find("detr-rl").evaluator()(config(detector), run)  # type: ignore[misc]
    run.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    before, after = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in rows if "eval/quality" in row][
        -2:
    ]
    assert after == before
    drawn = sorted(path.relative_to(tmp_path / "run" / "images") for path in tmp_path.glob("run/images/**/*.png"))
    assert len(drawn) == 3  # before the first step and twice on the way
    fresh = runtime(tmp_path, "fresh")
    with pytest.raises(UserError, match="no checkpoint yet"):
        detr_rl.evaluate(config(detector), fresh)
    fresh.close()


def raises(*_: np.ndarray) -> float:
    raise ZeroDivisionError("no\nboxes")


def not_a_number(*_: np.ndarray) -> float:
    return float("nan")


def hangs(*_: np.ndarray) -> float:
    time.sleep(600)
    return 0.0


_calls = itertools.count()


def fails_later(*_: np.ndarray) -> float:
    """In the third step: each asks for 2 images × 3 answers."""
    if next(_calls) >= 12:
        raise ZeroDivisionError("too late")
    return 1.0


@pytest.mark.parametrize(("name", "message"), [("raises", "raised ZeroDivisionError: no boxes"),
                                               ("not_a_number", "returned nan")])  # fmt: skip
def test_bad_rewards(detector: Path, name: str, message: str) -> None:
    with pytest.raises(RewardFailed, match=message):
        tuner(config(detector)).update(batches(SceneSource(SCENES, 0, "train"), 0, 2), scorer(f"{__name__}:{name}"))


def test_nothing_is_lost_by_a_reward_that_fails_later(detector: Path, tmp_path: Path) -> None:
    run = runtime(tmp_path, "run")
    with pytest.raises(RewardFailed, match="too late"):
        detr_rl.train(config(detector, reward=f"{__name__}:fails_later", eval_every=9), run)
    run.close()
    assert final_state(tmp_path, "run")["step"] == 2


@pytest.mark.ray
def test_a_reward_that_hangs(detector: Path, tmp_path: Path) -> None:
    run = runtime(tmp_path, "run", backend="ray")
    settings = config(detector, reward=f"{__name__}:hangs", reward_timeout_s=1.0)
    try:
        with pytest.raises(RewardFailed, match="took over --reward-timeout-s 1 s"):
            detr_rl.train(settings, run)
    finally:
        run.close()


def test_a_rate_that_diverges(detector: Path) -> None:
    subject, paying = tuner(config(detector, lr=1e20)), scorer()
    source = SceneSource(SCENES, 0, "train")
    batch = batches(source, 0, 2)
    subject.update(batch, paying)
    with pytest.raises(UserError, match="answers are not finite"):
        subject.update(batch, paying)
    with pytest.raises(UserError, match="answers are not finite"):
        evaluate_detector(subject.net, [HeldoutBatch([0, 1], batch)], source, 2, "cpu")


def test_a_gradient_that_is_not_finite_changes_no_weight(detector: Path) -> None:
    subject = tuner(config(detector))
    subject.parameters[0].register_hook(lambda gradient: gradient * torch.nan)
    before = [parameter.clone() for parameter in subject.parameters]
    with pytest.raises(UserError, match="gradient is not finite at step 1"):
        subject.update(batches(SceneSource(SCENES, 0, "train"), 0, 2), scorer())
    assert all(torch.equal(a, b) for a, b in zip(before, subject.parameters))


def test_bad_settings(detector: Path) -> None:
    for change, message in [
        ({"samples": 1}, "--samples is 1: a leave-one-out baseline"),
        ({"lr": 0}, "--lr is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            config(detector, **change)
    with pytest.raises(UserError, match="--model is missing"):
        tuner(config(Path()))
    with pytest.raises(UserError, match="cannot be imported"):
        scorer("envs.vision.box_quality:nothing")
    with pytest.raises(UserError, match="knows no label 'a', which the data has"):
        DetectorTuner(config(detector), ("a", "b"), 0, "cpu")
