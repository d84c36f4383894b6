"""The verifier of PromptScene (scene_prompts.py): an actor that draws prompts and looks for what was specified."""

from collections.abc import Sequence

import numpy as np

from envs.reasoning.answers import extract_answer
from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.scene_prompts import SceneJudgeConfig, scene_of
from envs.reasoning.verify import UNPARSABLE, verdict_of
from envs.vision.prompt_drawing import DiffusionDrawer, Drawer, Drawing, RenderingDrawer
from envs.vision.scene_agreement import share_of_all


class SceneJudge:
    """Draws what completions ask for and counts what is seen of what the problems ask for. Things that nobody asked for
    cost: otherwise the prompt that names everything is the best answer to every problem.

    A prompt need not be in the grammar of captions. Each different prompt is drawn once. Raises UserError for models
    that are not there or cannot be read.
    """

    def __init__(self, config: SceneJudgeConfig, seed: int, device: str = "cpu") -> None:
        self._draw = make_drawer(config, seed, device)

    def score(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """Score each completion of the problem at the same position; `unparsable` where there is no prompt."""
        prompts = [extract_answer(completion) for completion in completions]
        drawings = self._drawings(prompts)
        return [
            UNPARSABLE if prompt is None else _verdict(problem, drawings[prompt])
            for problem, prompt in zip(problems, prompts, strict=True)
        ]

    def pictures(self, completions: Sequence[str]) -> np.ndarray:
        """The pictures (N, H, W, 3) uint8 of all completions that hold a prompt."""
        prompts = [prompt for c in completions if (prompt := extract_answer(c)) is not None]
        drawings = self._drawings(prompts)
        return np.stack([drawings[prompt].image for prompt in prompts]) if prompts else np.zeros((0, 1, 1, 3), np.uint8)

    def _drawings(self, prompts: Sequence[str | None]) -> dict[str, Drawing]:
        different = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        return dict(zip(different, self._draw(different), strict=True)) if different else {}


def make_drawer(config: SceneJudgeConfig, seed: int, device: str) -> Drawer:
    if config.drawer == "renderer":
        return RenderingDrawer(seed)
    diffusion, detector = config.folders()
    return DiffusionDrawer(diffusion, detector, config.steps, config.guidance, seed, device)


def _verdict(problem: Problem, drawing: Drawing) -> Verdict:
    return verdict_of(share_of_all(scene_of(problem.metadata).objects, drawing.found, drawing.image))
