"""The three ways in which a pattern says what is read, and attention over its intervals."""

import pytest
import torch

from models.language.attention import packed_attention, sparse_attention
from models.language.interval_attention import BLOCK, block_mask, interval_attention
from models.language.packing import Packing
from models.language.sparse_patterns import Fixed, Pattern, Sliding, Strided

PATTERNS = [Sliding(1), Sliding(20), Strided(1), Strided(7), Strided(200), Fixed(8, 3), Fixed(5, 5), Fixed(200, 1)]
LENGTHS = (150, 1, 29, 64)


def dense(pattern: Pattern, length: int) -> torch.Tensor:
    position = torch.arange(length)
    return pattern.allowed(position[:, None], position)


def qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reads_lists_what_is_allowed(pattern: Pattern) -> None:
    read, exists = pattern.reads(torch.arange(150), 150)
    listed = torch.zeros(150, 150, dtype=torch.int64)
    rows = torch.arange(150)[:, None].expand_as(read)
    listed.index_put_((rows[exists], read[exists]), torch.tensor(1), accumulate=True)
    assert torch.equal(listed, dense(pattern, 150).long())  # each position once
    assert (read >= 0).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_parts_cover_each_allowed_pair_once(pattern: Pattern) -> None:
    packing = Packing.of(LENGTHS)
    tokens = sum(LENGTHS)
    covered = torch.zeros(tokens, tokens, dtype=torch.int64)
    for part in pattern.parts(packing):
        queries = torch.arange(tokens) if part.queries is None else part.queries
        keys = torch.arange(tokens) if part.keys is None else part.keys
        assert (part.first.diff() >= 0).all()
        assert (part.end.diff() >= 0).all()
        number = torch.arange(len(keys))
        inside = (number >= part.first[:, None]) & (number < part.end[:, None])
        covered[queries[:, None], keys] += inside.long()
    expected = torch.block_diag(*(dense(pattern, length).float() for length in LENGTHS))
    assert torch.equal(covered, expected.long())


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_attention_over_intervals_equals_the_dense_mask(pattern: Pattern) -> None:
    """FlexAttention's plain form: on the CPU it has no backward pass (tests/models/language/test_cuda.py has)."""
    packing = Packing.of(LENGTHS)
    q, k, v = qkv(sum(LENGTHS))
    ours = interval_attention(q, k, v, pattern.parts(packing))
    torch.testing.assert_close(ours, packed_attention(q, k, v, packing, pattern), atol=1e-6, rtol=0)


@torch.no_grad()
def test_block_masks_visit_few_blocks() -> None:
    """A fine pattern must not make every block count: 4096 tokens, 32 blocks, 528 causal pairs of blocks."""
    packing = Packing.of([4096])
    visited = {
        type(pattern).__name__: [int(block_mask(p, 4096).kv_num_blocks.sum()) for p in pattern.parts(packing)]
        for pattern in (Sliding(64), Strided(64), Fixed(64, 8))
    }
    assert BLOCK == 128
    near = 32 + 31  # each block of queries and the one before it
    assert visited["Sliding"] == [near]
    assert visited["Strided"] == [near, 32]  # sorted, 64 runs of 64 tokens: two to a block
    assert visited["Fixed"][0] == 32
    assert visited["Fixed"][1] <= 32 * (512 // BLOCK + 1) / 2 + 32  # 512 summary tokens


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_single_queries_gather_what_they_read(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.language.attention.READ_ENTRIES", 40_000)  # several slices
    q, k, v = qkv(150)
    ours = sparse_attention(q, torch.arange(150), pattern, 150, lambda tokens, read: (k[read], v[read]))
    expected = packed_attention(q, k, v, Packing.of([150]), pattern)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
