"""What one request leaves in vLLM's memory must not reach another: preempted, aborted and finished requests, whose
pages and states others get next; and batches that a captured graph fills up."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_rl import weights
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.vllm_engine.generator import VLLMGenerator
from models.language.checkpoint import save_pretrained, to_checkpoint
from tests.llm_rl.scoring import differences, moved, with_biases
from tests.models.language.policies import HYBRID, RECURRENT, RECURRENT_KINDS, SPARSE, made

KINDS = {
    "hybrid": replace(
        HYBRID,
        head_dim=32,
        initializer_range=0.12,
        scoring_func="sigmoid",
        routed_scaling_factor=0.3,
        router_selection_bias=True,
    ),
    "recurrent": replace(RECURRENT, head_dim=32, num_hidden_layers=7, layer_types=(*RECURRENT_KINDS, "full_attention")),
    "sparse": replace(SPARSE, head_dim=32, initializer_range=0.12),
}
PROMPTS = [[(7 * i + j) % 97 for j in range(100)] for i in range(11)]
LONG = SamplingConfig(temperature=0.8, max_tokens=100)  # past one more page of memory, of whatever size
MIXED = SamplingConfig(temperature=0.8, max_tokens=40, stop_token_ids=(3, 4, 5))


@dataclass
class Report:
    """Difference of a run's logprobs to the learner's: mean of the worst sequence."""

    preemptions: int
    pressed: float
    after_abort: float
    stale: float
    fresh: float


def run(kind: str, device: str, folder: str) -> Report:
    model = with_biases(made(KINDS[kind]), seed=0)
    save_pretrained(model, folder)
    dtype = "float32" if device == "cpu" else "bfloat16"
    model = model.to(device, getattr(torch, dtype)).eval()
    engine = VLLMGenerator(
        folder, device=device, dtype=dtype, max_num_seqs=16, max_num_batched_tokens=256, enforce_eager=False,
        kv_cache_gib=0.1,
    )  # fmt: skip

    def off(groups: list[list[Completion]]) -> float:
        lengths = [len(c.tokens) for group in groups for c in group]
        rows = differences(model, PROMPTS, groups, 0.8).abs().split(lengths)
        return max(row.mean().item() for row in rows)

    scheduler = engine._engine.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    preempted = counted(scheduler, "_preempt_request")
    free = pool.get_num_free_blocks()
    lowest = [free]
    counted(scheduler, "schedule", lambda: lowest.append(pool.get_num_free_blocks()))
    engine.generate(PROMPTS[:1], LONG, 1, 0)
    hostages = pool.get_new_blocks(free - len(PROMPTS) * (free - min(lowest)) + 3)
    pressed = off(engine.generate(PROMPTS, LONG, 1, 1))
    pool.free_blocks(hostages)

    parameters = engine._sampling_params(max_tokens=50, temperature=1.0, ignore_eos=True, detokenize=False)
    for number in range(5):
        request = {"prompt_token_ids": PROMPTS[number]}
        engine._engine.llm_engine.add_request(str(number), request, parameters)
    for _ in range(6):
        engine._engine.llm_engine.step()
    outputs = [output.request_id for output in engine._engine.llm_engine.step()]
    engine._engine.llm_engine.abort_request(outputs)
    engine._engine.llm_engine.step()
    assert not engine._engine.llm_engine.has_unfinished_requests()
    after_abort = off(engine.generate(PROMPTS, MIXED, 1, 2))

    moved(model, seed=1)
    stale = off(engine.generate(PROMPTS, MIXED, 1, 3))
    engine.load_weights(weights.export(to_checkpoint(model)), version=1)
    fresh = off(engine.generate(PROMPTS, MIXED, 1, 3))
    engine.close()
    return Report(len(preempted), pressed, after_abort, stale, fresh)


def counted(owner: Any, name: str, then: Callable[[], Any] = lambda: None) -> list[None]:
    """Gets an entry at each call of a method; `then` is called after it."""
    calls: list[None] = []
    plain = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        result = plain(*args, **kwargs)
        then()
        return result

    setattr(owner, name, call)
    return calls


@pytest.mark.vllm
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_from_request_to_request(kind: str, engines: ProcessPoolExecutor, tmp_path: Path) -> None:
    report = engines.submit(run, kind, "cpu", str(tmp_path)).result(timeout=240)
    assert report.preemptions > 0
    assert max(report.pressed, report.after_abort, report.fresh) < 1e-5
    assert report.stale > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_on_a_gpu(kind: str, engine_of_its_own: ProcessPoolExecutor, tmp_path: Path) -> None:
    report = engine_of_its_own.submit(run, kind, "cuda", str(tmp_path)).result(timeout=240)
    print(kind, report)
    assert report.preemptions > 0
    assert max(report.pressed, report.after_abort, report.fresh) < 0.15
    assert report.stale > 2 * report.fresh
