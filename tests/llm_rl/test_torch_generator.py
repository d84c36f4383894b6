"""The plain generator: what it samples, and with which log-probabilities."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.local_group import LocalGroup
from llm_rl import weights
from llm_rl.config import RolloutConfig
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.rollout import RolloutWorker
from llm_rl.torch_generator import TorchGenerator, sample
from models.errors import UserError
from models.language.checkpoint import save_pretrained, to_checkpoint
from models.language.decoder import Decoder
from models.language.packing import Packing
from tests.llm_rl.scoring import moved, worst_difference
from tests.models.language.policies import HYBRID, POLICIES

PROMPTS = [[5, 9, 11], [7], list(range(60)), [5, 9, 11, 2]]
SAMPLING = SamplingConfig(temperature=0.8, max_tokens=20, stop_token_ids=(3, 4))


@pytest.fixture(params=POLICIES)
def model(request: pytest.FixtureRequest) -> Decoder:
    config = POLICIES[request.param]  # larger weights come near 1e-5 by rounding; without a norm small ones do nothing
    small = replace(config, initializer_range=0.12) if config.norm_placement != "none" else config
    return Decoder(small).init_weights(seed=0)


def generator(model: Decoder, folder: Path, **options: int) -> TorchGenerator:
    save_pretrained(model, folder)
    return TorchGenerator(folder, **options)


def test_logprobs_are_the_learners_before_and_after_an_update(model: Decoder, tmp_path: Path) -> None:
    ours = generator(model, tmp_path)
    before = ours.generate(PROMPTS, SAMPLING, samples=3, seed=0)
    assert worst_difference(model, PROMPTS, before, 0.8) <= 1e-5
    moved(model, seed=1)
    assert worst_difference(model, PROMPTS, before, 0.8) > 1e-3  # stale weights are noticed
    ours.load_weights(weights.export(to_checkpoint(model)), version=7)
    after = ours.generate(PROMPTS, SAMPLING, samples=3, seed=0)
    assert worst_difference(model, PROMPTS, after, 0.8) <= 1e-5
    assert {c.version for group in before for c in group} == {0}
    assert {c.version for group in after for c in group} == {7}


def test_greedy_equals_decoding_without_a_cache(model: Decoder, tmp_path: Path) -> None:
    groups = generator(model, tmp_path).generate(PROMPTS, SamplingConfig(temperature=0, max_tokens=8), 2, seed=0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                hidden_TD = model(torch.tensor(tokens), Packing.of([len(tokens)]))
            tokens.append(int(model.logits(hidden_TD)[-1].argmax()))
        assert [c.tokens for c in group] == [tokens[len(prompt) :]] * 2
        assert {c.finish for c in group} == {"length"}
    assert worst_difference(model, PROMPTS, groups, 1.0) <= 1e-5


def test_the_same_call_repeats_itself_in_waves_of_any_size(tmp_path: Path) -> None:
    model = Decoder(HYBRID).init_weights(0)
    ours = generator(model, tmp_path, max_num_seqs=5)
    first = ours.generate(PROMPTS, SAMPLING, samples=4, seed=11)
    assert first == ours.generate(PROMPTS, SAMPLING, samples=4, seed=11)
    assert first != ours.generate(PROMPTS, SAMPLING, samples=4, seed=12)
    assert [len(group) for group in first] == [4] * 4
    assert len({tuple(c.tokens) for c in first[0]}) > 1
    assert worst_difference(model, PROMPTS, first, 0.8) <= 1e-5


def test_stop_tokens_end_a_completion_and_stay_in_it(tmp_path: Path) -> None:
    groups = generator(Decoder(HYBRID).init_weights(0), tmp_path).generate(PROMPTS, SAMPLING, samples=16, seed=0)
    completions = [c for group in groups for c in group]
    stopped = [c for c in completions if c.finish == "stop"]
    assert stopped
    assert len(stopped) < len(completions)
    for c in completions:
        assert len(c.tokens) == len(c.logprobs)
        assert not set(c.tokens[:-1]) & {3, 4}
        assert (c.tokens[-1] in (3, 4)) == (c.finish == "stop")
        assert c.finish == "stop" or len(c.tokens) == 20


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0])
    tokens, logprobs = sample(logits.expand(20_000, -1), 0.5, torch.Generator().manual_seed(0))
    expected = (logits / 0.5).softmax(-1)
    share = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 has no tokens"), ([list(range(90)) * 3], "prompt 0 has 270 tokens.*context of 256")],
)
def test_prompts_that_cannot_be_served(prompts: list[list[int]], message: str, tmp_path: Path) -> None:
    ours = generator(Decoder(HYBRID).init_weights(0), tmp_path)
    with pytest.raises(UserError, match=message):
        ours.generate(prompts, SAMPLING, 1, 0)


def test_a_rollout_worker_makes_one(model: Decoder, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    worker = RolloutWorker(tmp_path, "torch", RolloutConfig(dtype="float32"), device="cpu", context=80, seed=0)
    groups = worker.rollout(PROMPTS, SAMPLING, 2, seed=0)
    assert worst_difference(model, PROMPTS, groups, 0.8) <= 1e-5
    with pytest.raises(UserError, match="context of 80"):
        worker.rollout([[1] * 61], SAMPLING, 1, seed=0)


def test_a_context_beyond_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context of 257 tokens.*max_position_embeddings \(256\)"):
        generator(Decoder(HYBRID).init_weights(0), tmp_path, max_model_len=257)


def test_nothing_to_do(tmp_path: Path) -> None:
    ours = generator(Decoder(HYBRID).init_weights(0), tmp_path)
    assert ours.generate([], SAMPLING, 2, 0) == []
    assert ours.generate([[1]], SamplingConfig(max_tokens=0), 1, 0) == [[Completion([], [], "length", 0)]]
    ours.close()


def test_a_worker_in_our_own_process_lets_its_engine_go(tmp_path: Path) -> None:
    save_pretrained(Decoder(HYBRID).init_weights(0), tmp_path)
    group = LocalGroup(RolloutWorker, 1, (tmp_path, "torch", RolloutConfig(), "cpu", 64, 0), {})
    (worker,) = group._actors
    group.close()
    assert not hasattr(worker.generator, "model")
