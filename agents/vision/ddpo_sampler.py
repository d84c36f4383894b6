"""The images that DDPO learns from, with their rewards: drawn by the learner itself, or ahead of it by actors.

    learner   update 1 (with the weights W0)   update 2 (W1)         update 3 (W2)
    samplers  draw for update 2 with W0        draw for 3 with W1    ...

Actors draw an iteration's images with the weights that the iteration before began with, while the learner makes its
update. Each image carries the log-probabilities of the policy that drew it, so importance sampling stays right; the
score function, which has no ratio, would be biased. After a checkpoint they draw with its weights, and the learner
waits: a run that is resumed from there repeats one that was never interrupted.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from agents.vision.ddpo_learner import DDPOLearner, Rollout
from agents.vision.pictures import as_bytes
from agents.vision.prefetch import survive
from agents.vision.reward_calls import paid
from models.seeding import derive_seed

if TYPE_CHECKING:
    from agents.vision.ddpo import DDPOConfig
    from launch.run import ActorGroup, Run


def sample(
    config: "DDPOConfig", run: "Run", learner: DDPOLearner, scorer: "ActorGroup", prompts: Sequence[str]
) -> tuple[Rollout, np.ndarray]:
    """One iteration's images with their kept steps, and their rewards: scored while the next batch is sampled."""
    rollouts, asked = [], []
    for at, batch in batches(config, run.seed, learner.iteration, prompts):
        rollout, images = learner.sample(batch, noise(run.seed, learner.iteration, at))
        rollouts.append(rollout)
        asked.append(scorer.call(0, "score", as_bytes(images), batch, timeout_s=config.reward_timeout_s))
    return Rollout.join(rollouts), paid(config.reward, config.reward_timeout_s, asked)


class Sampler:
    """An actor that draws with the weights it is given. Raises UserError as DDPOLearner does."""

    def __init__(self, config: "DDPOConfig", seed: int, device: str) -> None:
        self._learner, self._seed = DDPOLearner(config, seed, device), seed
        self._version: int | None = None

    def sample(
        self, weights: dict[str, np.ndarray], version: int, iteration: int, at: int, prompts: list[str]
    ) -> tuple[Rollout, np.ndarray]:
        """The steps, on the CPU, and the images (B, H, W, 3) uint8. version: the iteration that began with `weights`.

        All that decides the result is in the call: made again by another actor it is the same.
        """
        if version != self._version:
            self._learner.load_weights({name: torch.tensor(weight) for name, weight in weights.items()})
            self._version = version
        rollout, images = self._learner.sample(prompts, noise(self._seed, iteration, at))
        return rollout.to("cpu"), as_bytes(images)


class SamplesAhead:
    """Images of one iteration after the other, from actors."""

    def __init__(
        self, config: "DDPOConfig", run: "Run", learner: DDPOLearner, scorer: "ActorGroup", prompts: Sequence[str]
    ) -> None:
        self._config, self._run, self._learner, self._scorer = config, run, learner, scorer
        self._prompts = prompts
        resources = {"cpu": 1.0, "gpu": config.sampler_gpu if run.device == "cuda" else 0.0}
        self.actors = run.actors(
            Sampler, config.sampler_workers, resources, config, run.seed, run.device, name="sampler"
        )
        self._asked: dict[int, list[_Draw]] = {}

    def take(self) -> tuple[Rollout, np.ndarray]:
        """What the learner's next update is of, as `sample` gives it; has the actors begin what comes after.

        Raises RewardFailed, and KeptDying if the actors die over one batch again and again.
        """
        config, iteration = self._config, self._learner.iteration
        if iteration not in self._asked:  # the run's first, or the first after a checkpoint
            self._asked[iteration] = self._ask(iteration)
        following = iteration + 1
        if following < config.iterations and following % config.eval_every:
            self._asked[following] = self._ask(following)
        drawn = [draw.result() for draw in self._asked.pop(iteration)]
        rewards = paid(config.reward, config.reward_timeout_s, [asked for _, asked in drawn])
        return Rollout.join([rollout for rollout, _ in drawn]).to(self._learner.device), rewards

    def _ask(self, iteration: int) -> "list[_Draw]":
        """With the weights as they are now."""
        config, version = self._config, self._learner.iteration
        weights = self._run.share(self._learner.weights())
        draws = []
        for number, (at, batch) in enumerate(batches(config, self._run.seed, iteration, self._prompts)):
            call = partial(
                self.actors.call, number % len(self.actors), "sample", weights, version, iteration, at, batch,
                timeout_s=config.sampler_timeout_s,
            )  # fmt: skip
            score = partial(self._scorer.call, 0, "score", prompts=batch, timeout_s=config.reward_timeout_s)
            draws.append(_Draw(call, score))
        return draws


class _Draw:
    """A batch that is being drawn, and then scored, whatever the learner does meanwhile."""

    def __init__(
        self, draw: "partial[Future[tuple[Rollout, np.ndarray]]]", score: "partial[Future[np.ndarray]]"
    ) -> None:
        self._draw, self._score = draw, score
        self._future = self._begin()

    def result(self) -> "tuple[Rollout, Future[np.ndarray]]":
        return survive(self._future, self._begin, "--sampler-timeout-s")

    def _begin(self) -> "Future[tuple[Rollout, Future[np.ndarray]]]":
        both: Future[tuple[Rollout, Future[np.ndarray]]] = Future()

        def pass_on(drawn: "Future[tuple[Rollout, np.ndarray]]") -> None:
            try:
                rollout, images = drawn.result()
                both.set_result((rollout, self._score(images=images)))
            except Exception as error:  # noqa: BLE001  (whatever it is, it belongs to the Future)
                both.set_exception(error)

        self._draw().add_done_callback(pass_on)
        return both


def batches(config: "DDPOConfig", seed: int, iteration: int, prompts: Sequence[str]) -> list[tuple[int, list[str]]]:
    """The prompts that an iteration draws, batch by batch, each with the number of its first image."""
    rng = np.random.default_rng(derive_seed(seed, "prompts", iteration))
    drawn = rng.integers(len(prompts), size=config.samples // config.images_per_prompt)
    picked = [prompts[i] for i in drawn.repeat(config.images_per_prompt).tolist()]
    return [(at, picked[at : at + config.batch_size]) for at in range(0, config.samples, config.batch_size)]


def noise(seed: int, iteration: int, at: int) -> torch.Generator:
    """Of a batch's images."""
    return torch.Generator().manual_seed(derive_seed(seed, "noise", iteration, at))
