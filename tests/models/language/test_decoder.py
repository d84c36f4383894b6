"""Packing and the cache change how the decoder computes, never what."""

import pytest
import torch

from models.language.config import MIXER_KINDS
from models.language.decoder import Decoder
from models.language.mixers import MIXERS
from models.language.packing import Packing
from models.language.router import RouterTrace
from tests.models.language.policies import HYBRID, POLICIES

LENGTHS = (90, 1, 17, 64)


def tokens(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (length,), generator=generator) for length in lengths]


def alone(policy: Decoder, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    return [policy.logits(policy(sequence, Packing.of([len(sequence)]))) for sequence in sequences]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_pack_equals_each_sequence_alone(policy: Decoder) -> None:
    sequences = tokens()
    packed = policy.logits(policy(torch.cat(sequences), Packing.of(LENGTHS)))
    assert packed.std() > 0.5
    for ours, expected in zip(packed.split(LENGTHS), alone(policy, sequences), strict=True):
        close(ours, expected)


@torch.no_grad()
def test_causal(policy: Decoder) -> None:
    (sequence,) = tokens((80,))
    changed = sequence.clone()
    changed[50] = (changed[50] + 1) % 97
    before, after = (policy(x, Packing.of([80])) for x in (sequence, changed))
    assert torch.equal(before[:50], after[:50])
    assert (before[50:] - after[50:]).abs().amax(-1).min() > 1e-4  # and every later token feels the change


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(policy: Decoder) -> None:
    """Prompts of several lengths, a second chunk of prompt, single tokens, and rows dropped on the way."""
    sequences = tokens()
    expected = alone(policy, sequences)
    cache = policy.empty_cache(batch=4, max_len=120)
    read = [0, 0, 0, 0]

    def advance(rows: list[int], lengths: list[int]) -> None:
        new = [sequences[row][read[row] : read[row] + length] for row, length in zip(rows, lengths)]
        logits = policy.logits(policy(torch.cat(new), Packing.of(lengths), cache))
        for row, ours in zip(rows, logits.split(lengths)):
            close(ours, expected[row][read[row] : read[row] + len(ours)])
            read[row] += len(ours)

    advance([0, 1, 2, 3], [70, 1, 9, 30])
    cache.select([3, 0, 2])  # row 1 is finished
    advance([3, 0, 2], [20, 3, 1])
    for _ in range(7):
        advance([3, 0, 2], [1, 1, 1])
    cache.select([1, 0])
    advance([0, 3], [10, 7])
    assert read == [90, 1, 17, 64]
    assert cache.lengths == [90, 64]


@torch.no_grad()
def test_a_prompt_read_once_serves_several_samples(policy: Decoder) -> None:
    sequences = tokens((20, 11))
    endings = tokens((5, 5, 5, 5))
    cache = policy.empty_cache(batch=2, max_len=25)
    policy(torch.cat(sequences), Packing.of([20, 11]), cache)
    cache.select([0, 0, 1, 1])
    ours = policy.logits(policy(torch.cat(endings), Packing.of([5] * 4), cache)).split(5)
    for row, ending in enumerate(endings):
        whole = torch.cat([sequences[row // 2], ending])
        close(ours[row], policy.logits(policy(whole, Packing.of([len(whole)])))[-5:])


def test_a_full_cache_says_so() -> None:
    policy = Decoder(HYBRID).init_weights(0)
    with pytest.raises(ValueError, match="holds 4 tokens"):
        policy(torch.arange(5), Packing.of([5]), policy.empty_cache(1, 4))


def test_trace_holds_one_record_per_mixture_layer() -> None:
    policy = Decoder(HYBRID).init_weights(0)
    trace = RouterTrace()
    policy(torch.arange(9), Packing.of([4, 5]), trace=trace)
    assert [record.experts_TK.shape for record in trace.records] == [(9, 2), (9, 2)]
    assert trace.records[0].logits_TE.requires_grad


def test_the_experts_of_a_trace_can_be_replayed_layer_by_layer() -> None:
    policy = Decoder(HYBRID).init_weights(0)
    replay_TLK = torch.randint(0, 6, (9, 2, 2), generator=torch.Generator().manual_seed(0))
    trace = RouterTrace(replay_TLK)
    policy(torch.arange(9), Packing.of([4, 5]), trace=trace)
    assert torch.equal(torch.stack([record.experts_TK for record in trace.records], 1), replay_TLK)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("post-norm", "deepnorm")])
def test_initialisation_at_its_default(name: str) -> None:
    config = POLICIES[name]
    one, same, other = (Decoder(config).init_weights(seed) for seed in (0, 0, 1))
    for (key, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert a.isfinite().all(), key
        assert torch.equal(a, b)
        if a.ndim > 1:
            assert not torch.equal(a, c) or key.endswith(".scale")
            residual = "o_proj" in key or "down_proj" in key
            if key.endswith((".projection", ".scale")):  # not drawn like a matrix
                continue
            sigma = config.initializer_range / ((2 * config.num_hidden_layers) ** 0.5 if residual else 1)
            assert a.abs().max() <= 3 * sigma + 1e-6
            if a.numel() > 1000:
                assert a.std().item() == pytest.approx(sigma, rel=0.1)


def test_packing_pads_and_unpads() -> None:
    packing = Packing.of([3, 1, 2], starts=[0, 7, 1])
    x_T = torch.arange(1, 7)
    assert packing.pad(x_T).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert torch.equal(packing.unpad(packing.pad(x_T)), x_T)
    assert packing.positions_T.tolist() == [0, 1, 2, 7, 1, 2]
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 6]
    with pytest.raises(ValueError, match="at least one token"):
        Packing.of([3, 0])


def test_every_kind_that_a_config_may_name_exists() -> None:
    assert tuple(MIXERS) == MIXER_KINDS
