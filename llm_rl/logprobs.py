"""Log-probabilities of given tokens without the full logits.

N tokens, D hidden size, V vocabulary, C chunk of tokens. A [N, V] float32 tensor is 5 GB for 8k tokens of a 150k
vocabulary; here at most [C, V] exists at a time, in the forward and in the backward pass (which recomputes it).
"""

from typing import Any

import torch
from torch import Tensor

# Logits alive at once (512 MiB in float32): each chunk reads and writes the head's whole gradient, [V, D] in float32.
CHUNK_ELEMENTS = 2**27


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
        normalizer_N = hidden_ND.new_empty(len(targets_N), dtype=torch.float32)
        logprobs_N = torch.empty_like(normalizer_N)
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            logits_CV = _logits(hidden_ND[rows], head_VD, temperature)
            normalizer_N[rows] = logits_CV.logsumexp(-1)
            logprobs_N[rows] = logits_CV.gather(1, targets_N[rows, None])[:, 0] - normalizer_N[rows]
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, normalizer_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """d logp(y)/d logits = onehot(y) - softmax(logits)."""
        (grad_N,) = grads
        hidden_ND, head_VD, targets_N, normalizer_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # accumulated in float32: the head's gradient is a sum over all chunks
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits_CV = _logits(hidden_ND[rows], head_VD, ctx.temperature)
            grad_CV = logits_CV.sub_(normalizer_N[rows, None]).exp_().neg_()
            grad_CV.scatter_add_(1, targets_N[rows, None], torch.ones_like(grad_CV[:, :1]))
            grad_CV = grad_CV.mul_(grad_N[rows, None] / ctx.temperature).to(hidden_ND.dtype)
            grad_hidden_ND[rows] = grad_CV @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += grad_CV.T @ hidden_ND[rows]
        return grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None


def _logits(hidden_CD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    """Float32, and nobody else's to keep."""
    logits_CV = (hidden_CD @ head_VD.T).float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def token_logprobs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(hidden·headᵀ / temperature)[target], float32 [N]. Differentiable in hidden and head."""
    return _TokenLogprobs.apply(hidden_ND, head_VD, targets_N, temperature)
