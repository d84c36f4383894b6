"""Prompts and completions in a policy's own dialogue format: what ends a turn, and thinking that the prompt opens."""

from collections.abc import Sequence
from dataclasses import replace
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
from tests.models.language.policies import DENSE

THINKING = CHAT_TEMPLATE.replace("prompt %}<|assistant|>", "prompt %}<|assistant|><think>\n")
QUESTION = Problem("p", "What is 2 + 2?", "4", "exact")


def dialogue(
    folder: Path, template: str | None = CHAT_TEMPLATE, system_prompt: str = "", stops: tuple = ()
) -> Dialogue:
    tokenizer = train_tokenizer(["What is 2 + 2? 4"], 300)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    ends = tuple(tokenizer.convert_tokens_to_ids(list(stops)))
    return Dialogue(folder, replace(DENSE, vocab_size=300, eos_token_id=ends), system_prompt)


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


def test_thinking_that_the_prompt_opened_must_be_closed(tmp_path: Path) -> None:
    of = dialogue(tmp_path, THINKING)
    assert of.tokenizer.decode(of.prompt("?")) == "<|user|>?<|assistant|><think>\n"
    assert verdict(of, "4").reason == "unparsable"
    assert verdict(of, "2 and 2</think>4<|end|>").correct
    assert verdict(of, "<think>2 and 2</think>4<|end|>").correct


def test_thinking_that_the_prompt_did_not_open_need_not_be_closed(tmp_path: Path) -> None:
    assert verdict(dialogue(tmp_path), "4").correct
    told = "Think between <think> and </think>."
    assert verdict(dialogue(tmp_path, system_prompt=told), "4").correct
    assert verdict(dialogue(tmp_path, THINKING, told), "4").reason == "unparsable"
    closed = THINKING.replace("<think>\n", "<think></think>")
    assert verdict(dialogue(tmp_path, closed), "4").correct


def test_thinking_that_the_problem_itself_opens_without_a_template(tmp_path: Path) -> None:
    of = dialogue(tmp_path, None)
    opened = Problem("p", "User: 2 + 2?\nAssistant: <think>", "4", "exact")
    assert verdict(of, "4", opened).reason == "unparsable"
    assert verdict(of, "</think>4", opened).correct
    assert verdict(of, "4").correct


SOLUTIONS = ["<think>2 and 2</think>4", "2 and 2</think>4", "<think></think>4", "4"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING], ids=["plain", "thinking"])
@pytest.mark.parametrize("solution", SOLUTIONS)
def test_what_a_worked_solution_teaches_is_a_right_answer(tmp_path: Path, template: str, solution: str) -> None:
    of = dialogue(tmp_path, template)
    session = Session.__new__(Session)
    session.dialogue, session.run = of, SimpleNamespace(seed=0)  # type: ignore[assignment]
    (sample,) = session.worked([replace(QUESTION, solution=solution)], 0.0)
    whole = of.tokenizer.decode([*sample.prompt, *sample.completion])
    assert whole.count("<think>") == (1 if template == THINKING else solution.count("<think>"))
    assert verdict(of, of.tokenizer.decode(sample.completion)).correct
    if template == CHAT_TEMPLATE:
        assert of.text(sample.completion) == solution
