"""The reasoning trainer in the manner of Kimi k1.5 (arXiv 2501.12599): SFT warm-up, then iterations of

    sample problems → roll out k completions each → verify → policy mirror descent → sync weights

Steps count over both phases: SFT steps 1..S, then one step an RL iteration.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from envs.reasoning.problem import Problem
from llm_rl.batch import Sample
from llm_rl.config import ReasonConfig, RLConfig, require_sizes
from llm_rl.length_reward import length_reward
from llm_rl.objective import advantages
from llm_rl.sampler import ProblemSampler
from llm_rl.session import Attempt, Session
from llm_rl.sft import finetune, prepare
from llm_rl.vllm_engine.adapters import require_servable
from models.errors import UserError
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


def train(config: ReasonConfig, run: "Run") -> None:
    """The `reason` job. Writes policy/final, a Hugging Face folder, and heldout/... figures to summary.json."""
    validate(config, run.device)
    session = open_session(config, run)
    try:
        state = run.restore()
        warmed_up = state is not None and state["step"] >= config.sft.steps
        if state is None:
            session.evaluate("base", 0)
        if not warmed_up:
            prepare(session, run, state)
            finetune(session, run, start=state["step"] if state else 0)
        optimise(session, config, run, state if warmed_up else None)
        session.learn("save", run.directory / "policy" / "final")
        if config.rl.lora.rank and not config.sft.steps:  # the adapters belong to a model that the user has
            session.learn("save_adapter", run.directory / "policy" / "adapter")
        show_result(run, config)
    finally:
        session.close()


def check(config: ReasonConfig, run: "Run") -> None:
    """For `--dry-run`: as `train` begins."""
    validate(config, run.device)
    open_session(config, run).close()


def open_session(config: ReasonConfig, run: "Run") -> Session:
    rl = config.rl
    adapter_rank = rl.lora.rank * (2 if rl.lora.init == "pissa" else 1) if rl.lora.serve == "adapter" else 0
    return Session(config, run, rl.max_tokens, rl.temperature, rl.router_replay, adapter_rank)


def optimise(session: Session, config: ReasonConfig, run: "Run", state: dict[str, Any] | None) -> None:
    """The RL phase, from its beginning or from the state of a checkpoint."""
    rl, first = config.rl, config.sft.steps
    sampler = ProblemSampler(session.sets.train, run.seed, rl.sampling == "prioritised", rl.curriculum, rl.admit_at)
    done = 0
    if state is not None and state["phase"] == "rl":
        session.learn("attach_lora", rl.lora, derive_seed(run.seed, "lora"))
        session.learn("load_state", state["learner"])
        sampler.load_state(state["sampler"])
        done = state["step"] - first
        session.version = state["version"] - 1  # the sync below is that of the checkpoint's weights
        session.sync()
    else:
        if state is not None:
            prepare(session, run, state)
        session.learn("fold_lora")
        session.learn("attach_lora", rl.lora, derive_seed(run.seed, "lora"))
        session.sync()
        if config.sft.steps:
            session.evaluate("sft", first)

    total = first + rl.iterations
    for iteration in range(done, rl.iterations):
        step, begin = first + iteration + 1, time.perf_counter()
        chosen = sampler.sample(rl.problems_per_iteration, iteration)
        problems = [session.sets.train[i] for i in chosen]
        seed = derive_seed(run.seed, "rollout", iteration)
        attempts = session.attempt(problems, session.sampling, rl.samples, seed)
        rolled = time.perf_counter()
        samples, metrics = judge(session, problems, attempts, rl, iteration)
        sampler.update(chosen, [sum(a.verdict.correct for a in row) / len(row) for row in attempts])
        lr = rl.lr * (1 - (1 - rl.final_lr_ratio) * iteration / rl.iterations)
        metrics |= session.learn("iterate", samples, rl, lr, derive_seed(run.seed, "minibatches", iteration), step)
        learned = time.perf_counter()
        session.sync()
        times = durations(begin, rolled, learned, time.perf_counter(), metrics["train/tokens"])
        restarts = {"run/actor_restarts": float(session.workers.restarts)}
        session.record(step, "train", problems, attempts)
        run.log(step, telling_first(metrics | sampler.metrics() | times | restarts), total)
        if config.eval.every and (iteration + 1) % config.eval.every == 0 and step < total:
            session.evaluate("current", step)
        if (iteration + 1) % config.save_every == 0 or step == total:
            state_now = {"phase": "rl", "step": step, "version": session.version, "sampler": sampler.state()}
            run.save(step, state_now | {"learner": session.learn("state")}, score=metrics["train/reward"])
    session.evaluate("rl", total)


def durations(begin: float, rolled: float, learned: float, synced: float, tokens: float) -> dict[str, float]:
    return {
        "time/rollout_s": rolled - begin,
        "time/learn_s": learned - rolled,
        "time/sync_s": synced - learned,
        "time/tokens_per_s": tokens / (synced - begin),
        "time/rollout_tokens_per_s": tokens / (rolled - begin),
    }


def telling_first(metrics: dict[str, float]) -> dict[str, float]:
    """The console shows the first few metrics of a step."""
    telling = ("train/reward", "train/correct", "train/mean_tokens", "train/mismatch_kl", "train/grad_norm")
    return {name: metrics[name] for name in telling} | metrics


def judge(
    session: Session, problems: Sequence[Problem], attempts: Sequence[Sequence[Attempt]], rl: RLConfig, iteration: int
) -> tuple[list[Sample], dict[str, float]]:
    """Verdicts → rewards (with the length reward once it is on) → advantages within each problem's samples."""
    samples: list[Sample] = []
    reasons: dict[str, float] = {}
    mixed = 0
    for group, (problem, row) in enumerate(zip(problems, attempts)):
        rewards = [a.verdict.reward for a in row]
        if rl.length_reward and iteration >= rl.length_reward_from:
            bonus = length_reward([len(a.completion.tokens) for a in row], [a.verdict.correct for a in row])
            rewards = [reward + rl.length_reward * extra for reward, extra in zip(rewards, bonus)]
        mixed += len(set(rewards)) > 1
        for a, reward, advantage in zip(row, rewards, advantages(rewards, rl.objective)):
            reasons[a.verdict.reason] = reasons.get(a.verdict.reason, 0.0) + 1
            samples.append(
                Sample(
                    session.prompts[problem.prompt],
                    a.completion.tokens,
                    a.completion.logprobs,
                    advantage,
                    group,
                    reward,
                    a.completion.experts,
                )
            )
    count = len(samples)
    flat = [a for row in attempts for a in row]
    metrics = {
        "train/reward": sum(s.reward for s in samples) / count,
        "train/correct": sum(a.verdict.correct for a in flat) / count,
        "train/mixed_groups": mixed / len(problems),  # groups that carry a signal
        "train/mean_tokens": sum(len(s.completion) for s in samples) / count,
        "train/unfinished": sum(a.completion.finish == "length" for a in flat) / count,
    }
    return samples, metrics | {f"verdict/{reason}": number / count for reason, number in reasons.items()}


def evaluate(config: ReasonConfig, run: "Run") -> None:
    """`longstride evaluate RUN`: the checkpoint's policy on the held-out problems, under the tag `checkpoint`."""
    require_sizes(config)  # its flags may differ from the run's
    state = run.restore()
    session = Session(config, run, config.rl.max_tokens, config.rl.temperature)
    try:
        assert state is not None  # the command line refuses a run without a checkpoint
        if state["phase"] == "rl":
            session.learn("attach_lora", config.rl.lora, derive_seed(run.seed, "lora"))
            session.learn("load_state", state["learner"])
        else:
            prepare(session, run, state)
        session.sync()
        figures = session.evaluate("checkpoint", state["step"])
        run.table("held-out problems", ["figure", "value"], [[name, f"{v:.3f}"] for name, v in figures.items()])
    finally:
        session.close()


def plan(config: ReasonConfig, device: str) -> list[tuple[str, int, float, float, float]]:
    """What `--dry-run` shows: (what, count, CPUs, GPUs, GiB of memory each)."""
    gpus = 1.0 if device == "cuda" else 0.0
    rollout, learner, policy = config.rollout, config.learner, config.policy
    if config.model:
        files = list(config.model.glob("*.safetensors"))
        parameters = sum(file.stat().st_size for file in files) / 2  # bfloat16 on disk
    else:
        mixer = 4 * policy.hidden_size * policy.num_attention_heads * policy.head_dim
        inner = policy.intermediate_size or policy.num_experts * policy.moe_intermediate_size
        feed_forward = 3 * policy.hidden_size * (inner + policy.shared_expert_intermediate_size)
        parameters = len(policy.layer_types) * (mixer + feed_forward) + policy.vocab_size * policy.hidden_size
    gib = parameters / 2**30
    wide = learner.dtype == "bfloat16"
    learner_gib = gib * (2 if wide else 4)
    if not config.rl.lora.rank or (config.sft.steps and not config.sft.lora.rank):
        learner_gib += gib * (18 if wide else 12)  # gradients, float32 masters and moments; of adapters next to nothing
    draws = any(source.startswith("scene:") for source in config.problems)
    engine_gib = gib * (2 if rollout.dtype == "bfloat16" else 4) + rollout.kv_cache_gib
    return [
        ("learner", 1, float(learner.threads), gpus * learner.gpu_share, 0.5 + learner_gib),
        (f"rollout ({config.engine})", rollout.workers, 1.0, gpus * rollout.gpu_share, 0.9 + engine_gib),
        ("verifier", config.verifier_workers, 1.0, 0.0, 0.3),
        *([("scene judge", config.scene.workers, 1.0, gpus * config.scene.gpu_share, 1.0)] if draws else []),
    ]


def validate(config: ReasonConfig, device: str) -> None:
    """Refuse what cannot train, before anything is started."""
    require_sizes(config)
    rl = config.rl
    if rl.samples < 2 and rl.objective != "rest":
        raise UserError(f"--rl.samples {rl.samples}: a baseline over a problem's samples needs at least 2")
    if rl.length_reward and rl.objective == "rest":
        raise UserError(
            f"--rl.length-reward {rl.length_reward:g}: --rl.objective rest keeps right answers and drops wrong ones, "
            "whatever their length; leave the length reward out, or choose another objective"
        )
    if rl.minibatches > rl.problems_per_iteration:
        raise UserError(
            f"--rl.minibatches {rl.minibatches} exceeds --rl.problems-per-iteration {rl.problems_per_iteration}: "
            "the samples of a problem stay in one minibatch"
        )
    if rl.router_replay and config.engine == "vllm" and device == "cpu":
        raise UserError(
            "--rl.router-replay: vLLM's CPU kernels do not tell which experts they used; use --engine torch"
        )
    if rl.lora.serve == "adapter":
        if not rl.lora.rank:
            raise UserError("--rl.lora.serve adapter: there is no adapter; set --rl.lora.rank, or leave the flag out")
        if config.sft.steps:
            raise UserError(
                "--rl.lora.serve adapter: fine-tuning in the same run changes the weights below the adapter; fine-tune "
                "with `train sft` first and give its policy/final as --model with --sft.steps 0"
            )
        if config.engine == "vllm":
            experts = [target for target in rl.lora.targets if "experts." in target]
            require_servable({"use_dora": rl.lora.use_dora, "target_parameters": experts})
    if rl.temperature <= 0:
        raise UserError(f"--rl.temperature {rl.temperature}: RL samples, so it must be above 0")


def show_result(run: "Run", config: ReasonConfig) -> None:
    """Print the held-out figures of base, SFT and RL side by side."""
    figures = run.summary_metrics()
    rows = []
    for tag in ("base", "sft", "rl"):
        if f"heldout/pass@1/{tag}" in figures:
            row = [figures.get(f"heldout/{name}/{tag}") for name in ("pass@1", "greedy", "reward", "mean_tokens")]
            rows.append([tag, *(f"{value:.3f}" if value is not None else "" for value in row)])
    run.table("held-out problems", ["policy", "pass@1", "greedy", "reward", "mean tokens"], rows)
