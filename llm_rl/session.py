"""What a language job works with: the policy's folder, its problems, the learner, the rollout workers, the verifiers.

The job itself (sft.py, reason.py) is then a short loop over these verbs.
"""

import contextlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from envs.reasoning.problem import Problem, Verdict
from llm_rl.batch import Sample
from llm_rl.config import LanguageJob, SFTJobConfig
from llm_rl.evaluation import heldout_metrics
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.learner import Learner, check_lora
from llm_rl.policy_folder import policy_folder
from llm_rl.problem_sets import load_problem_sets
from llm_rl.rollout import RolloutWorker, collect
from llm_rl.sampler import family
from llm_rl.tokenizer import Dialogue
from llm_rl.verifiers import Verifiers
from models.errors import ActorsFailed, UserError
from models.language.checkpoint import read_config
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


SHOWN = 16  # held-out problems whose pictures an evaluation keeps, where there are any
EMPTY = "<think></think>"
THOUGHT = re.compile("<think>.*</think>", re.DOTALL)


@dataclass(frozen=True)
class Attempt:
    """One completion with its verdict. text: as the verifier reads it, with a `<think>` that the prompt ended in."""

    completion: Completion
    text: str
    verdict: Verdict


class Session:
    def __init__(
        self,
        config: LanguageJob,
        run: "Run",
        max_tokens: int,
        temperature: float,
        record_experts: bool = False,
        adapter_rank: int = 0,
    ) -> None:
        """adapter_rank: largest rank of the adapters that are sent to the workers in the place of whole weights."""
        self.config, self.run, self.temperature = config, run, temperature
        self.sets = load_problem_sets(config, run.seed)
        self.folder = policy_folder(
            config.model, config.policy, self.sets.sft or self.sets.train, run.directory / "policy" / "init", run.seed
        )
        language = read_config(self.folder)
        check_lora(language, config)
        if record_experts and not any(language.is_moe(layer) for layer in range(language.num_hidden_layers)):
            raise UserError("--rl.router-replay: the policy has no mixture of experts; leave the flag out")
        self.dialogue = Dialogue(self.folder, language, config.system_prompt)
        self.prompts = {p.prompt: self.dialogue.prompt(p.prompt) for p in [*self.sets.train, *self.sets.heldout]}
        context = self._context(max_tokens, language.max_position_embeddings)
        self.sampling = SamplingConfig(temperature, max_tokens, self.dialogue.stops)
        self.verifiers = Verifiers(config, run, [*self.sets.train, *self.sets.heldout])
        gpu = run.device == "cuda"
        rollout, learner = config.rollout, config.learner
        with contextlib.ExitStack() as undo:
            undo.callback(self.verifiers.close)  # the run ends its actors, and these are none
            self.learner = run.actors(
                Learner,
                1,
                {"cpu": learner.threads, "gpu": learner.gpu_share if gpu else 0},
                self.folder,
                learner,
                run.device,
                name="learner",
            )
            self.workers = run.actors(
                RolloutWorker,
                rollout.workers,
                {"cpu": 1, "gpu": rollout.gpu_share if gpu else 0},
                self.folder,
                config.engine,
                rollout,
                run.device,
                context,
                run.seed,
                record_experts,
                adapter_rank,
                name="rollout",
            )
            self.version = 0
            self.what = ("adapter", "load_adapter") if adapter_rank else (self._transport(), "load_weights")
            undo.pop_all()

    def _context(self, max_tokens: int, limit: int) -> int:
        """Longest prompt plus completion, rounded up; refuse what the policy was not made for."""
        longest = max([*self.sets.train, *self.sets.heldout], key=lambda p: len(self.prompts[p.prompt]))
        length = len(self.prompts[longest.prompt])
        context = length + max_tokens
        if context > limit:
            flag = "--max-tokens" if isinstance(self.config, SFTJobConfig) else "--rl.max-tokens"
            raise UserError(
                f"problem {longest.id}: its prompt of {length} tokens plus {max_tokens} new tokens "
                f"exceed the policy's context of {limit}; shorten the prompt or lower {flag}"
            )
        return min(limit, -(-context // 64) * 64)

    def _transport(self) -> str:
        """How the learner offers its weights: in its GPU's memory, if all workers share that GPU, or on the host."""
        if self.run.device == "cpu":
            return "weights"
        timeout_s = self.config.rollout.timeout_s
        asked = [self.learner.call(0, "gpu", timeout_s=timeout_s), *self.workers.broadcast("gpu", timeout_s=timeout_s)]
        return "weights" if len({answer.result() for answer in asked}) == 1 else "weights_on_host"

    def close(self) -> None:
        self.verifiers.close()
        self.workers.close()
        self.learner.close()

    def learn(self, method: str, *args: Any, share_result: bool = False) -> Any:
        """Call the learner and wait. A dead learner ends the job: its state is in the last checkpoint. Raises
        ActorsFailed if it takes longer than its time limit."""
        limit_s = self.config.learner.timeout_s
        try:
            return self.learner.call(0, method, *args, timeout_s=limit_s, share_result=share_result).result()
        except TimeoutError as error:
            raise ActorsFailed(
                f"the learner's `{method}` took longer than --learner.timeout-s {limit_s:g}; the last checkpoint is "
                f"kept: raise it, or give the learner less to do in a step ({error})"
            ) from error

    def sync(self) -> None:
        """Bring the learner's weights, or its adapter, to every worker."""
        self.version += 1
        offer, load = self.what
        weights = self.learn(offer, share_result=True)
        timeout_s = self.config.rollout.timeout_s
        pushes = self.workers.broadcast(load, weights, self.version, timeout_s=timeout_s, sticky=True)
        for push in pushes:
            with contextlib.suppress(ConnectionError):  # the replacement repeats this sticky call before any other
                push.result()

    def attempt(
        self, problems: Sequence[Problem], sampling: SamplingConfig, samples: int, seed: int
    ) -> list[list[Attempt]]:
        """Sample every problem and verify; verification of one worker's share overlaps the others' generation."""
        attempts: list[list[Attempt]] = [[] for _ in problems]

        def verify(indices: list[int], completions: list[list[Completion]]) -> None:
            openings = [self.dialogue.opening(problems[i].prompt) for i in indices]
            texts = [[o + self.dialogue.text(c.tokens) for c in group] for o, group in zip(openings, completions)]
            owners = [problems[i] for i, group in zip(indices, texts) for _ in group]
            verdicts = iter(self.verifiers.score(owners, [text for group in texts for text in group]))
            for index, group, words in zip(indices, completions, texts):
                attempts[index] = [Attempt(c, text, next(verdicts)) for c, text in zip(group, words)]

        prompts = [self.prompts[p.prompt] for p in problems]
        collect(self.workers, prompts, sampling, samples, seed, self.config.rollout.timeout_s, verify)
        return attempts

    def evaluate(self, tag: str, step: int) -> dict[str, float]:
        """Evaluate the workers' present weights on the held-out problems, record every completion."""
        problems, config = self.sets.heldout, self.config.eval
        greedy_sampling = SamplingConfig(0.0, self.sampling.max_tokens, self.sampling.stop_token_ids)
        greedy = self.attempt(problems, greedy_sampling, 1, derive_seed(self.run.seed, "greedy", tag))
        sampled = self.attempt(problems, self.sampling, config.samples, derive_seed(self.run.seed, "evaluate", tag))
        metrics = heldout_metrics(
            tag,
            [family(p) for p in problems],
            [row[0].verdict.correct for row in greedy],
            [[a.verdict.correct for a in row] for row in sampled],
            [[a.completion for a in row] for row in sampled],
            [[a.verdict.reward for a in row] for row in sampled],
        )
        pictures = self.verifiers.pictures([row[0].text for row in greedy[:SHOWN]])
        if len(pictures):
            self.run.images(step, f"heldout/{tag}", pictures)
        self.record(step, f"heldout-{tag}", problems, sampled)
        self.run.log(step, metrics)
        self.run.summarize(metrics)
        return metrics

    def record(self, step: int, kind: str, problems: Sequence[Problem], attempts: Sequence[Sequence[Attempt]]) -> None:
        """Keep every completion with its reward, for the run's rollouts/ folder."""
        rows = [
            {
                "problem": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "completion": a.text,
                "tokens": len(a.completion.tokens),
                "finish": a.completion.finish,
                "version": a.completion.version,
                "reward": a.verdict.reward,
                "reason": a.verdict.reason,
            }
            for problem, row in zip(problems, attempts)
            for a in row
        ]
        self.run.record(step, kind, rows)

    def worked(self, problems: Sequence[Problem], direct_share: float) -> list[Sample]:
        """Worked solutions as training samples, a share of them with the work left out."""
        rng = random.Random(derive_seed(self.run.seed, "direct"))
        solutions = [p.solution or "" for p in problems]
        texts = [THOUGHT.sub(EMPTY, s) if rng.random() < direct_share else s for s in solutions]
        if direct_share and problems and texts == solutions:
            raise UserError(f"--sft.direct-share {direct_share}: no solution has the form {EMPTY}, with work inside")
        of = self.dialogue
        return [Sample(of.prompt(p.prompt), of.answer(p.prompt, t), []) for p, t in zip(problems, texts)]
