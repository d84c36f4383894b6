"""The state of a trainer as two flat things that hold no code: named tensors, and JSON.

A tree of dicts, lists and tuples becomes JSON in which each tensor or array is a reference into safetensors files.
Dicts whose keys are not plain strings (optimizer states number their parameters) keep their keys' types.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_MARK = "$"  # a dict with one key that starts so is ours, not the trainer's


@dataclass
class FlatState:
    """tree: JSON data. tensors: on the CPU, contiguous, none sharing memory with another. arrays: C-contiguous."""

    tree: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Raises TypeError naming the path of a leaf that cannot be stored without pickling."""
    return _Flattener().run(state)


def unflatten(flat: FlatState) -> Any:
    """The inverse of `flatten`. A tensor that stood in several places is one tensor again."""
    return _decode(flat.tree, flat)


class _Flattener:
    def __init__(self) -> None:
        self.flat = FlatState(None)
        self.names: dict[tuple, str] = {}  # tied weights are stored once
        self.storages: set[int] = set()

    def run(self, state: Mapping[str, Any]) -> FlatState:
        self.flat.tree = self._encode(dict(state), "state")
        return self.flat

    def _encode(self, value: Any, path: str) -> Any:
        match value:
            case None | bool() | str():
                return value
            case np.generic():
                return value.item()  # before float: numpy's float64 is a float too
            case int() | float():
                return value
            case list():
                return [self._encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
            case tuple():
                return {f"{_MARK}tuple": [self._encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
            case Mapping():
                return self._encode_mapping(value, path)
            case torch.Tensor():
                return {f"{_MARK}tensor": self._store_tensor(value)}
            case np.ndarray():
                return {f"{_MARK}array": self._store_array(value, path)}
        raise TypeError(
            f"{path} is a {type(value).__name__}: a checkpoint holds only tensors, numpy arrays, numbers, strings, "
            "bools, None, and dicts, lists and tuples of them"
        )

    def _encode_mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        plain = all(isinstance(key, str) for key in value) and not any(key.startswith(_MARK) for key in value)
        if plain:
            return {key: self._encode(item, f"{path}.{key}") for key, item in value.items()}
        for key in value:
            if not isinstance(key, str | int | float | bool):
                raise TypeError(f"{path} has a key of type {type(key).__name__}: use str, int, float or bool")
        return {f"{_MARK}items": [[key, self._encode(item, f"{path}[{key!r}]")] for key, item in value.items()]}

    def _store_tensor(self, tensor: torch.Tensor) -> str:
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        if tensor.numel() and identity in self.names:
            return self.names[identity]
        name = f"{len(self.flat.tensors):06d}"
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        # safetensors refuses tensors that share memory, and would write the whole of a slice's storage.
        if storage.nbytes() != host.numel() * host.element_size() or storage.data_ptr() in self.storages:
            host = host.clone()
        self.storages.add(host.untyped_storage().data_ptr())
        self.flat.tensors[name] = host
        self.names[identity] = name
        return name

    def _store_array(self, array: np.ndarray, path: str) -> str:
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{path} is an array of {array.dtype}: a checkpoint holds arrays of numbers and bools")
        name = f"{len(self.flat.arrays):06d}"
        # ascontiguousarray would make a 0-dimensional array 1-dimensional.
        self.flat.arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
        return name


def _decode(node: Any, flat: FlatState) -> Any:
    if isinstance(node, list):
        return [_decode(item, flat) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((key, value),) = node.items()
        match key:
            case "$tensor":
                return flat.tensors[value]
            case "$array":
                return flat.arrays[value]
            case "$tuple":
                return tuple(_decode(item, flat) for item in value)
            case "$items":
                return {key: _decode(item, flat) for key, item in value}
    return {key: _decode(item, flat) for key, item in node.items()}
