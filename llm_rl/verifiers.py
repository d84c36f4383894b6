"""Each completion to whoever can judge it: code in killable processes, or models that draw and look, in actors."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.reasoning import scene_prompts
from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.verifier_pool import VerifierPool
from llm_rl.config import LanguageJob
from models.errors import ActorsFailed, UserError

if TYPE_CHECKING:
    from launch.run import ActorGroup, Run

log = logging.getLogger(__name__)

ATTEMPTS = 2  # at one batch of scenes, the second on an actor that was started anew


class Verifiers:
    """Starts what the problems need, and nothing else. counts: verdicts of scene prompts so far, by reason."""

    def __init__(self, config: LanguageJob, run: "Run", problems: Sequence[Problem]) -> None:
        needed = {problem.verifier for problem in problems}
        self.settings = config.scene
        self.counts: Counter[str] = Counter()
        self.judges = _start_judges(config, run) if scene_prompts.VERIFIER in needed else None
        of_code = needed - {scene_prompts.VERIFIER}
        self.pool = VerifierPool(config.verifier_workers, config.verifier_timeout_s) if of_code else None

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Score each completion of the problem at the same position.

        A batch of scenes whose judge dies or runs out of time is given to the judge that replaces it; if that one dies
        too, the batch earns 0, with the reason `lost`. Raises ActorsFailed if every batch of a call is lost.
        """
        verdicts: dict[int, Verdict] = {}
        drawn = [i for i, problem in enumerate(problems) if problem.verifier == scene_prompts.VERIFIER]
        size = self.settings.batch_size
        batches = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        asked = [self._ask(number, batch, problems, completions) for number, batch in enumerate(batches)]
        if self.pool is not None:  # meanwhile
            others = [i for i in range(len(problems)) if problems[i].verifier != scene_prompts.VERIFIER]
            verdicts |= zip(others, self.pool.score([problems[i] for i in others], [completions[i] for i in others]))
        lost = 0
        for number, batch in enumerate(batches):
            judged = self._wait(number, asked[number], (batch, problems, completions))
            lost += judged is None
            scene_verdicts = judged or [Verdict(0.0, "lost")] * len(batch)
            verdicts |= zip(batch, scene_verdicts)
            self.counts.update(verdict.reason for verdict in scene_verdicts)
        if lost and lost == len(batches):
            raise ActorsFailed(
                f"no picture could be drawn and looked at within --scene.timeout-s {self.settings.timeout_s:g} s "
                "(see logs/scene-*.log): raise it, or lower --scene.batch-size"
            )
        return [verdicts[i] for i in range(len(problems))]

    def pictures(self, completions: Sequence[str]) -> np.ndarray:
        """What a judge draws for completions: (N, H, W, 3) uint8; none if there are no judges or theirs died."""
        nothing = np.zeros((0, 1, 1, 3), np.uint8)
        if self.judges is None or not completions:
            return nothing
        try:
            return self.judges.call(0, "pictures", completions, timeout_s=self.settings.timeout_s).result()
        except ConnectionError as error:
            log.warning("the pictures of held-out prompts are left out: %s", error)
            return nothing

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
        if self.judges is not None:
            self.judges.close()

    def _ask(
        self, number: int, batch: Sequence[int], problems: Sequence[Problem], completions: Sequence[str]
    ) -> "Future[list[Verdict]]":
        assert self.judges is not None
        arguments: tuple[Any, ...] = [problems[i] for i in batch], [completions[i] for i in batch]
        return self.judges.call(number % len(self.judges), "score", *arguments, timeout_s=self.settings.timeout_s)

    def _wait(self, number: int, asked: "Future[list[Verdict]]", again: tuple[Any, ...]) -> list[Verdict] | None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return asked.result()
            except ConnectionError as error:
                log.warning("a batch of scene prompts, attempt %d of %d: %s", attempt, ATTEMPTS, error)
                if attempt < ATTEMPTS:
                    asked = self._ask(number, *again)
        return None


def _start_judges(config: LanguageJob, run: "Run") -> "ActorGroup":
    try:
        from envs.reasoning.scene_judge import SceneJudge
    except ModuleNotFoundError as error:
        raise UserError(f"scene:prompt needs the package {error.name}: pip install 'longstride[vision]'") from error
    settings = config.scene
    if settings.drawer == "diffusion":
        settings.folders()  # refused here, before anything is started
    resources = {"cpu": 1.0, "gpu": settings.gpu_share if run.device == "cuda" else 0.0}
    return run.actors(SceneJudge, settings.workers, resources, settings, run.seed, run.device, name="scene")
