"""Rollout workers: actors that own one generator each, and the driver's side of asking them."""

import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_rl.config import RolloutConfig
from llm_rl.generator import Adapter, Completion, Generator, SamplingConfig
from llm_rl.weights import gpu
from models.errors import ActorsFailed
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import ActorGroup

ATTEMPTS = 5  # a call that is lost this often in a row points at the call, not at the machine
TIMEOUTS = 2  # so does one that is too long this often, and each of them takes the whole limit


class RolloutWorker:
    """One engine in one process. `context` is the longest prompt plus completion, in tokens. With `record_experts`
    completions carry what the policy's routers chose. With an `adapter_rank` (the largest) the weights stay those of
    the folder, and adapters are put beside them."""

    def __init__(
        self,
        folder: Path,
        engine: str,
        config: RolloutConfig,
        device: str,
        context: int,
        seed: int,
        record_experts: bool = False,
        adapter_rank: int = 0,
    ) -> None:
        self.generator: Generator
        if engine == "vllm":
            from llm_rl.vllm_engine.generator import VLLMGenerator

            self.generator = VLLMGenerator(
                folder,
                device=device,
                dtype=config.dtype,
                max_model_len=context,
                max_num_seqs=config.max_num_seqs,
                kv_cache_gib=config.kv_cache_gib,
                enforce_eager=config.enforce_eager,
                adapter_rank=adapter_rank,
                seed=seed,
                record_experts=record_experts,
            )
        else:
            from llm_rl.torch_generator import TorchGenerator

            self.generator = TorchGenerator(
                folder,
                device=device,
                dtype=config.dtype,
                max_model_len=context,
                max_num_seqs=config.max_num_seqs,
                record_experts=record_experts,
            )

    def gpu(self) -> str:
        return gpu()

    def load_weights(self, named: Mapping[str, Any], version: int) -> None:
        self.generator.load_weights(named, version)

    def load_adapter(self, adapter: Adapter, version: int) -> None:
        self.generator.load_adapter(adapter, version)

    def rollout(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, samples: int, seed: int
    ) -> list[list[Completion]]:
        return self.generator.generate(prompts, sampling, samples, seed)

    def close(self) -> None:
        """Where the worker is no process of its own, whose end would free all."""
        self.generator.close()


def collect(
    workers: "ActorGroup",
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    samples: int,
    seed: int,
    timeout_s: float,
    done: Callable[[list[int], list[list[Completion]]], None] | None = None,
) -> list[list[Completion]]:
    """Sample every prompt `samples` times, the prompts dealt out to the workers; in the order of `prompts`.

    A share whose worker died is asked again with the same seed, so a death changes nothing but the time. `done` is
    called with each share (indices, completions) as it arrives, while other workers still generate.

    Raises ActorsFailed if a share is lost ATTEMPTS times, or runs past the time limit TIMEOUTS times.
    """
    shares = {w: list(range(w, len(prompts), len(workers))) for w in range(min(len(workers), len(prompts)))}
    results: list[list[Completion]] = [[] for _ in prompts]

    def ask(worker: int) -> "concurrent.futures.Future[list[list[Completion]]]":
        mine = [prompts[i] for i in shares[worker]]
        share_seed = derive_seed(seed, "share", worker)
        return workers.call(worker, "rollout", mine, sampling, samples, share_seed, timeout_s=timeout_s)

    losses: dict[int, list[ConnectionError]] = {worker: [] for worker in shares}
    waiting = {ask(worker): worker for worker in shares}
    while waiting:
        ready, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ready:
            worker = waiting.pop(future)
            try:
                completions = future.result()
            except ConnectionError as error:
                losses[worker].append(error)
                _refuse_hopeless(losses[worker], timeout_s)
                waiting[ask(worker)] = worker
                continue
            for index, group in zip(shares[worker], completions):
                results[index] = group
            if done:
                done(shares[worker], completions)
    return results


def _refuse_hopeless(losses: Sequence[ConnectionError], timeout_s: float) -> None:
    """Raise ActorsFailed for a share that has been lost too often. A call past its limit is a TimeoutError too."""
    if sum(isinstance(loss, TimeoutError) for loss in losses) == TIMEOUTS:
        raise ActorsFailed(
            f"a rollout took longer than --rollout.timeout-s {timeout_s:g}, {TIMEOUTS} times: raise it, sample "
            f"fewer or shorter completions, or add --rollout.workers ({losses[-1]})"
        )
    if len(losses) == ATTEMPTS:
        raise ActorsFailed(
            f"the workers of one rollout died {ATTEMPTS} times in a row (--rollout.timeout-s {timeout_s:g} was not the "
            f"reason); the last time: {losses[-1]}"
        )
