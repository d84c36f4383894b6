"""Rollout routing replay (R3): what the generator records, and what the learner makes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_rl.batch import Sample, pack
from llm_rl.config import LearnerConfig, RLConfig
from llm_rl.generator import Completion, SamplingConfig
from llm_rl.learner import Learner
from llm_rl.objective import mismatch
from llm_rl.torch_generator import TorchGenerator
from models.language.checkpoint import load_pretrained, save_pretrained
from models.language.config import LanguageConfig
from models.language.decoder import Decoder
from models.language.router import RouterTrace
from tests.models.language.policies import DEEPSEEK, HYBRID, MOE

PROMPTS = [[5, 9, 11], [7], list(range(40)), [5, 9, 11, 2]]
SAMPLING = SamplingConfig(max_tokens=20, stop_token_ids=(3, 4))


def rollout(config: LanguageConfig, folder: Path, seed: int = 0) -> tuple[Decoder, list[Sample]]:
    model = Decoder(config).init_weights(seed).eval()
    for bias in model.buffers():
        bias.normal_(std=0.1)
    save_pretrained(model, folder)
    generator = TorchGenerator(folder, max_num_seqs=5, record_experts=True)
    groups = generator.generate(PROMPTS, SAMPLING, samples=3, seed=seed)
    pairs = [(prompt, c, group) for group, (prompt, row) in enumerate(zip(PROMPTS, groups)) for c in row]
    return model, [
        Sample(list(prompt), c.tokens, c.logprobs, (-1.0) ** i, group, 0.0, c.experts)
        for i, (prompt, c, group) in enumerate(pairs)
    ]


@pytest.mark.parametrize("config", [MOE, HYBRID, DEEPSEEK], ids=["moe", "hybrid", "deepseek"])
def test_the_generator_records_the_experts_of_every_token_that_was_read(config: LanguageConfig, tmp_path: Path) -> None:
    """The same weights over the whole sequences choose the same experts."""
    model, samples = rollout(config, tmp_path)
    layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    for sample in samples:
        assert sample.experts.shape == (len(sample), layers, config.num_experts_per_tok)
        assert sample.experts.dtype == np.uint8
    batch = pack(samples, "cpu")
    trace = RouterTrace()
    model(batch.tokens_T, batch.packing, trace=trace)
    own_TLK = torch.stack([record.experts_TK for record in trace.records], 1)
    assert torch.equal(own_TLK, batch.replay_TLK)


def test_many_experts_need_a_wider_number(tmp_path: Path) -> None:
    model = Decoder(replace(MOE, num_experts=300)).init_weights(0)
    save_pretrained(model, tmp_path)
    generator = TorchGenerator(tmp_path, record_experts=True)
    experts = generator.generate([[1, 2]], SAMPLING, 1, 0)[0][0].experts
    assert experts.dtype == np.int16
    assert experts.max() > 255


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    save_pretrained(Decoder(MOE).init_weights(0), tmp_path)
    completion: Completion = TorchGenerator(tmp_path).generate([[1, 2]], SAMPLING, 1, 0)[0][0]
    assert completion.experts is None
    assert pack([Sample([1, 2], completion.tokens, completion.logprobs)], "cpu").replay_TLK is None


def test_a_pack_needs_the_experts_of_all_its_samples_or_of_none(tmp_path: Path) -> None:
    _, samples = rollout(MOE, tmp_path)
    with pytest.raises(ValueError, match="every token of every sample"):
        pack([*samples, replace(samples[0], experts=None)], "cpu")
    with pytest.raises(ValueError, match="every token of every sample"):
        pack([replace(samples[0], experts=samples[0].experts[1:])], "cpu")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replay_lowers_the_mismatch_that_a_noisy_router_makes(seed: int, tmp_path: Path) -> None:
    """Noise on the learner's router flips experts. With the rollout's experts only the gate weights differ."""
    model, samples = rollout(replace(MOE, initializer_range=0.12), tmp_path, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in model.routers():
            router.weight.add_(torch.randn(router.weight.shape, generator=generator) * 0.02)
    save_pretrained(model, tmp_path)
    learner = Learner(tmp_path, LearnerConfig(threads=1), "cpu")
    plain = [replace(sample, experts=None) for sample in samples]
    sampler = torch.tensor([logprob for sample in samples for logprob in sample.sampler_logprobs])

    batch = pack(plain, "cpu")
    trace = RouterTrace()
    model(batch.tokens_T, batch.packing, trace=trace)
    own_TLK = torch.stack([record.experts_TK for record in trace.records], 1)
    flipped = (own_TLK.sort(-1).values != pack(samples, "cpu").replay_TLK.sort(-1).values).any(-1)
    assert 0.01 < flipped.float().mean() < 0.5

    without = mismatch(torch.cat(learner.score(plain, 1.0)), sampler)
    replayed = mismatch(torch.cat(learner.score(samples, 1.0)), sampler)
    assert replayed["train/mismatch_kl"] < 0.6 * without["train/mismatch_kl"]


def test_the_learner_trains_its_router_on_the_replayed_experts(tmp_path: Path) -> None:
    _, samples = rollout(DEEPSEEK, tmp_path)
    learner = Learner(tmp_path, LearnerConfig(threads=1, router_aux_loss_coef=0.0, router_bias_rate=0.0), "cpu")
    before = [router.weight.detach().clone() for router in learner.model.routers()]
    metrics = learner.iterate(samples, RLConfig(minibatches=2), lr=1e-3, seed=0, step=1)
    assert metrics["train/mismatch_max"] < 1e-4
    assert not learner.state()["optimizer"]["moments"]  # the next iteration begins without any
    chosen = np.concatenate([sample.experts for sample in samples])
    shares = np.stack([np.bincount(chosen[:, layer].ravel(), minlength=8) for layer in range(chosen.shape[1])])
    expected = (shares.max(-1) / shares.mean(-1) - 1).mean()
    assert metrics["moe/max_violation"] == pytest.approx(expected)  # of the replayed experts
    for old, router in zip(before, learner.model.routers(), strict=True):
        assert not torch.equal(old, router.weight)


def test_selection_biases_follow_the_load_and_are_saved(tmp_path: Path) -> None:
    model, samples = rollout(DEEPSEEK, tmp_path)
    learner = Learner(tmp_path, LearnerConfig(threads=1, router_bias_rate=0.25, router_aux_loss_coef=0.0), "cpu")
    batch, trace = pack([replace(s, experts=None) for s in samples], "cpu"), RouterTrace()
    model(batch.tokens_T, batch.packing, trace=trace)
    before = [bias.clone() for bias in learner.model.buffers()]
    metrics = learner.sft_step([replace(s, experts=None) for s in samples], lr=1e-3, step=1)
    assert {"moe/max_violation", "moe/load_entropy", "moe/dropped_share"} < metrics.keys()
    for record, old, new in zip(trace.records, before, learner.model.buffers(), strict=True):
        load_E = torch.bincount(record.experts_TK.flatten(), minlength=8).float()
        torch.testing.assert_close(new - old, 0.25 * (load_E.mean() - load_E).sign())

    learner.save(tmp_path / "saved")
    resumed = Learner(tmp_path, LearnerConfig(threads=1), "cpu")
    resumed.load_state(learner.state())
    for model in (load_pretrained(tmp_path / "saved"), resumed.model):
        for ours, theirs in zip(model.buffers(), learner.model.buffers(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_capacity_bounds_supervised_steps_alone(tmp_path: Path) -> None:
    config = replace(MOE, expert_capacity_factor=0.5)
    _, samples = rollout(config, tmp_path)
    learner = Learner(tmp_path, LearnerConfig(threads=1), "cpu")
    before = torch.cat(learner.score(samples, 1.0))
    sampler = torch.tensor([logprob for sample in samples for logprob in sample.sampler_logprobs])
    torch.testing.assert_close(before, sampler, atol=1e-4, rtol=0)
    plain = [replace(sample, experts=None) for sample in samples]
    assert learner.sft_step(plain, lr=0.0, step=1)["moe/dropped_share"] > 0.4
    assert torch.equal(torch.cat(learner.score(samples, 1.0)), before)
    assert learner.iterate(samples, RLConfig(minibatches=1), lr=0.0, seed=0, step=2)["moe/dropped_share"] == 0
