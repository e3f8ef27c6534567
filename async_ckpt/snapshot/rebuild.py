"""Rebuilds the objects of a state from a skeleton and its entries.

Guarantees: each entry becomes one object, so ties and views stay tied; it runs what unpickling runs, looks up nothing
of the state by name, and leaves nothing in torch's globals.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from async_ckpt.snapshot.entries import ArrayEntry, Entry, StorageEntry, TensorEntry

__all__ = ["INSTEAD", "Rebuilder", "itself", "make_array"]

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Rebuilder(pickle.Unpickler):
    """Reads one skeleton.

    Args:
        skeleton: the output of an ``ObjectPickler``.
        entries: the entries that it refers to, by number.
        storage_for: returns the storage with a number.
        memory: holds the bytes of arrays.
    """

    def __init__(
        self,
        skeleton: bytes,
        entries: Sequence[Entry],
        storage_for: Callable[[int], torch.UntypedStorage],
        memory: Any,
    ) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._entries = entries
        self._storage_for = storage_for
        self._memory = memory
        self._objects: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: int) -> Any:
        """Return the object of an entry."""
        if pid not in self._objects:
            self._objects[pid] = self._make(self._entries[pid])
        return self._objects[pid]

    def _make(self, entry: Entry) -> Any:
        if isinstance(entry, TensorEntry):
            return self._tensor(entry)
        if isinstance(entry, StorageEntry):
            untyped = self._storage(entry.storage)
            return untyped if entry.dtype is None else _typed(untyped, entry.dtype)
        return (self._memory, entry.region) if isinstance(entry, ArrayEntry) else entry.value

    def _storage(self, index: int) -> torch.UntypedStorage:
        if index not in self._storages:
            self._storages[index] = self._storage_for(index)
        return self._storages[index]

    def _tensor(self, entry: TensorEntry) -> torch.Tensor:
        tensor = _empty(entry.dtype).set_(
            self._storage(entry.storage), entry.offset, entry.size, entry.stride
        )
        tensor = tensor if tensor.dtype is entry.dtype else tensor.view(entry.dtype)
        if entry.is_parameter:
            return torch.nn.Parameter(tensor, entry.requires_grad)
        return tensor.requires_grad_() if entry.requires_grad else tensor


def _empty(dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(0, dtype=dtype, device="cpu")
    except RuntimeError:  # a quantized type, which is only made by looking at others' bytes as such
        return torch.empty(0, dtype=_SAME_SIZE[dtype.itemsize], device="cpu")


def itself(value: Any) -> Any:
    """Return *value*; stands for a constant in a skeleton."""
    return value


def make_array(place: tuple[Any, int], dtype: Any, shape: tuple[int, ...], order: Any) -> Any:
    """Return an array over the host memory at *place*."""
    import numpy

    memory, start = place
    return numpy.ndarray(shape, dtype, memory, start, order=order)


def _typed(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _rebuild_tensor_v3(storage: Any, *arguments: Any) -> Any:
    """Like torch's function, but given the pickled storage, not the wrapper of torch.load."""
    typed = _typed(storage, torch.uint8) if isinstance(storage, torch.UntypedStorage) else storage
    return torch._utils._rebuild_tensor_v3(typed, *arguments)


def _rebuild_sparse_tensor(layout: torch.layout, data: tuple[Any, ...]) -> torch.Tensor:
    """Like torch's function, but without queueing the tensor for validation by the next torch.load."""
    if layout == torch.sparse_coo:
        indices, values, size, *coalesced = data
        extra = {"is_coalesced": coalesced[0]} if coalesced else {}
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=False, **extra)
    compressed, plain, values, size = data
    return torch.sparse_compressed_tensor(
        compressed, plain, values, size, layout=layout, check_invariants=False
    )


def _on_cpu(data: torch.Tensor, dtype: torch.dtype, device: str, requires_grad: bool) -> torch.Tensor:
    """Keep the host copy of a tensor of a device without storages, such as XLA's."""
    return data.to(dtype).requires_grad_(requires_grad)


#: Functions of torch, and the functions that are called instead.
INSTEAD: dict[Any, Any] = {
    getattr(torch._utils, name): function
    for name, function in {
        "_rebuild_tensor_v3": _rebuild_tensor_v3,
        "_rebuild_sparse_tensor": _rebuild_sparse_tensor,
        "_rebuild_device_tensor_from_cpu_tensor": _on_cpu,
    }.items()
    if hasattr(torch._utils, name)
}
