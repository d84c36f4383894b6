"""Supervised fine-tuning on worked solutions: the warm-up before RL (Kimi k1.5, section 2.2), and a job of its own."""

import random
import time
from typing import TYPE_CHECKING, Any

from llm_rl.config import SFTJobConfig, require_sizes
from llm_rl.optimizer import cosine
from llm_rl.session import Session
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run

LOG_EVERY = 25  # optimizer steps per logged line


def train(config: SFTJobConfig, run: "Run") -> None:
    """The `sft` job: base evaluation, fine-tuning, evaluation, a Hugging Face folder in policy/final."""
    require_sizes(config)
    session = open_session(config, run)
    try:
        state = run.restore()
        if state is None:
            session.evaluate("base", 0)
        prepare(session, run, state)
        finetune(session, run, start=state["step"] if state else 0)
        session.sync()
        session.evaluate("sft", config.sft.steps)
        session.learn("save", run.directory / "policy" / "final")
        if config.sft.lora.rank:
            session.learn("save_adapter", run.directory / "policy" / "adapter")
    finally:
        session.close()


def check(config: SFTJobConfig, run: "Run") -> None:
    """For `--dry-run`: as `train` begins."""
    require_sizes(config)
    open_session(config, run).close()


def open_session(config: SFTJobConfig, run: "Run") -> Session:
    return Session(config, run, max_tokens=config.max_tokens, temperature=1.0)


def prepare(session: Session, run: "Run", state: dict[str, Any] | None) -> None:
    """Make the learner ready for this phase, or for what follows it: adapters if they are asked for, then the state of
    one of the phase's checkpoints."""
    session.learn("attach_lora", session.config.sft.lora, derive_seed(run.seed, "sft-lora"))
    if state is not None:
        session.learn("load_state", state["learner"])


def finetune(session: Session, run: "Run", start: int) -> None:
    """Run the SFT steps from `start` on; checkpoints every 20 × save_every steps and at the end."""
    config = session.config.sft
    samples = session.worked(session.sets.sft, config.direct_share)
    total = config.steps
    clock, tokens = time.perf_counter(), 0
    for step in range(start, total):
        rng = random.Random(derive_seed(run.seed, "sft", step))
        batch = [samples[i] for i in rng.sample(range(len(samples)), min(config.batch_size, len(samples)))]
        lr = config.lr * cosine(step, total, config.warmup, config.final_lr_ratio)
        metrics = session.learn("sft_step", batch, lr, step + 1)
        tokens += sum(len(sample) for sample in batch)
        done = step + 1
        if done % LOG_EVERY == 0 or done == total:
            seconds = time.perf_counter() - clock
            run.log(done, metrics | {"time/sft_tokens_per_s": tokens / seconds}, total)
            clock, tokens = time.perf_counter(), 0
        if done % (20 * session.config.save_every) == 0 or done == total:
            run.save(done, {"phase": "sft", "step": done, "learner": session.learn("state")})
