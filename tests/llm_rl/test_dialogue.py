"""Prompts and completions in a policy's own dialogue format: what ends a turn."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.verify import CHECKS
from launch.local_group import LocalGroup
from llm_rl.config import ReasonConfig
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.session import Session
from llm_rl.tokenizer import CHAT_TEMPLATE, Dialogue, train_tokenizer

QUESTION = Problem("p", "What is 2 + 2?", "4", "exact")


def dialogue(
    folder: Path, template: str | None = CHAT_TEMPLATE, system_prompt: str = "", stops: tuple = ()
) -> Dialogue:
    tokenizer = train_tokenizer(["What is 2 + 2? 4"], 300)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Dialogue(folder, system_prompt, tuple(tokenizer.convert_tokens_to_ids(list(stops))))


def verdict(of: Dialogue, said: str, problem: Problem = QUESTION) -> Verdict:
    """As a session hands it out for a completion of these tokens."""

    class Worker:
        def rollout(self, prompts: list, *_: object) -> list[list[Completion]]:
            tokens = of.tokenizer.encode(said, add_special_tokens=False)
            return [[Completion(tokens, [0.0] * len(tokens), "stop", 1)] for _ in prompts]

    def score(problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        return [CHECKS[p.verifier](p, text) for p, text in zip(problems, completions, strict=True)]

    session = Session.__new__(Session)
    session.config, session.dialogue, session.prompts = ReasonConfig(), of, {problem.prompt: of.prompt(problem.prompt)}
    session.workers, session.verifiers = LocalGroup(Worker, 1, (), {}), SimpleNamespace(score=score)  # type: ignore[assignment]
    return session.attempt([problem], SamplingConfig(), 1, seed=0)[0][0].verdict


@pytest.mark.parametrize("end", ["<|end|>", "<|user|>", "<|pad|>", ""])
def test_the_token_that_ended_the_answer_is_no_part_of_it(tmp_path: Path, end: str) -> None:
    of = dialogue(tmp_path, stops=("<|user|>", "<|pad|>"))
    assert verdict(of, f"4{end}").correct
    assert of.text(of.tokenizer.encode(f"4<|user|>{end or '4'}")) == ("4<|user|>" if end else "4<|user|>4")
    assert of.text([]) == ""
