"""Weights on their way from learner to generator through the object store: checkpoint names and numpy arrays.

numpy has no bfloat16, so such tensors travel as their bits under a marked name. Ray hands numpy arrays to actors
without a copy.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

BF16 = "@bf16"


def export(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Copy tensors (any device, float32 or bfloat16) to host arrays."""
    arrays = {}
    for name, tensor in named:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            arrays[name + BF16] = tensor.view(torch.int16).numpy().copy()
        else:
            arrays[name] = tensor.numpy().copy()
    return arrays


def tensors(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `export`. The tensors may share read-only memory with the object store: copy, don't write."""
    for name, array in arrays.items():
        if not array.flags.writeable:
            array = array.copy()  # torch refuses to promise anything about read-only memory
        tensor = torch.from_numpy(array)
        if name.endswith(BF16):
            yield name.removesuffix(BF16), tensor.view(torch.bfloat16)
        else:
            yield name, tensor
