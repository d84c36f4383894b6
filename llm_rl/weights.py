"""Weights on their way from the learner to the generators, under checkpoint names.

On the CPU they travel through the object store as numpy arrays, which Ray hands to actors without a copy. On one GPU
the learner writes them into one flat buffer that the generators map once (CUDA IPC) and read at every sync; nothing
but the layout travels. Whoever reads calls `received` when all is copied: the learner may write the buffer again then.
From GPU to GPU they go by the host as on the CPU.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError

BF16 = "@bf16"  # numpy has no bfloat16: such a tensor travels as its bits under a marked name
HANDLE, GPU = "@cuda", "@gpu"
ALIGN = 16  # bytes; a view of another dtype must start at a multiple of its size


def export(named: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """Copy tensors (any device, float32 or bfloat16) to host arrays."""
    arrays = {}
    for name, tensor in named:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            arrays[name + BF16] = tensor.view(torch.int16).numpy().copy()
        else:
            arrays[name] = tensor.numpy().copy()
    return arrays


class CudaExport:
    """The learner's end of the shared buffer. The buffer lives as long as this object."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.layout: list[tuple[str, str, list[int], int]] = []  # name, dtype, shape, byte offset
        self.offer: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """Write the tensors, the same names each time, and return the handle with the layout. Blocks until the copies
        are done."""
        if self.buffer is None:
            named = list(named)
            self.buffer = self._allocate(named)
        for (_, _, _, offset), (_, tensor) in zip(self.layout, named, strict=True):  # merged weights one at a time
            content = tensor.detach().contiguous()
            self.buffer[offset : offset + content.nbytes].copy_(content.view(-1).view(torch.uint8))
        torch.cuda.synchronize()
        return self.offer

    def _allocate(self, named: Sequence[tuple[str, Tensor]]) -> Tensor:
        size = 0
        for name, tensor in named:
            self.layout.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
            size += -(-tensor.nbytes // ALIGN) * ALIGN
        buffer = torch.empty(size, dtype=torch.uint8, device=named[0][1].device)
        from torch.multiprocessing.reductions import reduce_tensor

        _, handle = reduce_tensor(buffer)  # once: each call takes an event and a place in a table
        self.offer = {HANDLE: handle, GPU: gpu(), "layout": self.layout}
        return buffer


_mapped: dict[bytes, Tensor] = {}  # buffers of other processes that this process has opened, by handle


def gpu() -> str:
    """Which GPU this process computes on, whatever number it has here; "" for none."""
    if not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _open(handle: tuple[Any, ...], where: str) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    if where != gpu():
        raise UserError(
            "a rollout worker was started anew on another GPU than the learner's, which it cannot read weights from: "
            "`longstride resume` places all of them again"
        )
    key = handle[7]  # the IPC handle's bytes: the same allocation gives the same handle
    if key not in _mapped:
        _mapped[key] = rebuild_cuda_tensor(*handle)
    return _mapped[key]


def received(device: str) -> None:
    """Wait until this process has copied what `tensors` gave it."""
    if device != "cpu":
        torch.cuda.synchronize()


def tensors(weights: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight. They may share memory with the sender: copy from them, never write."""
    if HANDLE in weights:
        buffer = _open(weights[HANDLE], weights[GPU])
        for name, dtype, shape, offset in weights["layout"]:
            element = getattr(torch, dtype)
            size = element.itemsize * int(np.prod(shape))
            yield name, buffer[offset : offset + size].view(element).view(shape)
        return
    for name, array in weights.items():
        if not array.flags.writeable:
            array = array.copy()  # torch cannot promise to leave read-only memory alone
        tensor = torch.from_numpy(array)
        if name.endswith(BF16):
            yield name.removesuffix(BF16), tensor.view(torch.bfloat16)
        else:
            yield name, tensor
