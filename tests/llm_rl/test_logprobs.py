"""Chunked log-softmax against torch's, values and gradients."""

import pytest
import torch

from llm_rl import logprobs
from llm_rl.logprobs import token_logprobs


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax(chunk_rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 11
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk_rows * vocabulary)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    head = torch.randn(vocabulary, 5, requires_grad=True)
    targets = torch.randint(0, vocabulary, (7,))
    upstream = torch.randn(7)

    ours = token_logprobs(hidden, head, targets, temperature)
    ours_grads = torch.autograd.grad(ours, (hidden, head), upstream)
    theirs = torch.log_softmax(hidden @ head.T / temperature, -1).gather(1, targets[:, None])[:, 0]
    their_grads = torch.autograd.grad(theirs, (hidden, head), upstream)

    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    for ours_grad, their_grad in zip(ours_grads, their_grads):
        torch.testing.assert_close(ours_grad, their_grad, atol=1e-5, rtol=0)


def test_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    head = torch.randn(6, 3)
    token_logprobs(hidden, head, torch.tensor([0, 1, 2, 3])).sum().backward()
    assert hidden.grad is not None
    assert head.grad is None
