"""From a skeleton and its entries back to objects.

Guarantees: each entry becomes one object, so ties and views stay tied; an inert rebuild runs no code
of the state; a live one runs what unpickling runs, and leaves nothing behind in torch's globals.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from async_ckpt.snapshot import reduced
from async_ckpt.snapshot.entries import ArrayEntry, Entry, StorageEntry, TensorEntry

__all__ = ["INERT", "LIVE", "Rebuilder"]


class Rebuilder(pickle.Unpickler):
    """Reads one skeleton.

    Args:
        skeleton: the pickled state, bulk data lifted out.
        entries: what it refers to by number.
        globals_: `INERT` or `LIVE`: what some names in the skeleton mean.
        storage_for: gives the storage with a number; ``None`` leaves tensors and storages as entries.
        memory: holds the bytes of arrays.
    """

    def __init__(
        self,
        skeleton: bytes,
        entries: Sequence[Entry],
        globals_: dict[tuple[str, str], Any],
        storage_for: Callable[[int], torch.UntypedStorage] | None,
        memory: Any,
    ) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._entries = entries
        self._globals = globals_
        self._storage_for = storage_for
        self._memory = memory
        self._objects: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """Resolve a global, the few with a special meaning here first."""
        found = self._globals.get((module, name))
        return super().find_class(module, name) if found is None else found

    def persistent_load(self, pid: int) -> Any:
        """Return the object of an entry."""
        if pid not in self._objects:
            self._objects[pid] = self._make(self._entries[pid])
        return self._objects[pid]

    def _make(self, entry: Entry) -> Any:
        if self._storage_for is None and isinstance(entry, (TensorEntry, StorageEntry)):
            return entry
        if isinstance(entry, TensorEntry):
            return self._tensor(entry)
        if isinstance(entry, StorageEntry):
            untyped = self._storage(entry.storage)
            return untyped if entry.dtype is None else _typed(untyped, entry.dtype)
        return self._array(entry) if isinstance(entry, ArrayEntry) else entry.value

    def _storage(self, index: int) -> torch.UntypedStorage:
        if index not in self._storages:
            assert self._storage_for is not None
            self._storages[index] = self._storage_for(index)
        return self._storages[index]

    def _tensor(self, entry: TensorEntry) -> torch.Tensor:
        tensor = torch.empty(0, dtype=entry.dtype, device="cpu")
        tensor.set_(self._storage(entry.storage), entry.offset, entry.size, entry.stride)
        if entry.is_parameter:
            return torch.nn.Parameter(tensor, entry.requires_grad)
        return tensor.requires_grad_() if entry.requires_grad else tensor

    def _array(self, entry: ArrayEntry) -> Any:
        import numpy

        if 0 in entry.shape:  # numpy would ask the buffer to be longer than it needs
            return numpy.empty(entry.shape, entry.dtype, order=entry.order)
        return numpy.ndarray(entry.shape, entry.dtype, self._memory, entry.region, order=entry.order)


def _typed(untyped: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _rebuild_tensor_v3(storage: Any, *arguments: Any) -> Any:
    """Do what torch does, given the storage as pickled and not as torch.load would wrap it."""
    typed = _typed(storage, torch.uint8) if isinstance(storage, torch.UntypedStorage) else storage
    return torch._utils._rebuild_tensor_v3(typed, *arguments)


def _rebuild_sparse_tensor(layout: torch.layout, data: tuple[Any, ...]) -> torch.Tensor:
    """Do what torch does, without queueing the tensor for the next torch.load to validate."""
    if layout == torch.sparse_coo:
        indices, values, size, *coalesced = data
        extra = {"is_coalesced": coalesced[0]} if coalesced else {}
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=False, **extra)
    compressed, plain, values, size = data
    return torch.sparse_compressed_tensor(
        compressed, plain, values, size, layout=layout, check_invariants=False
    )


def _on_cpu(data: torch.Tensor, dtype: torch.dtype, device: str, requires_grad: bool) -> torch.Tensor:
    """Keep the host copy of a tensor that lives on a device without storages, such as XLA's."""
    return data.to(dtype).requires_grad_(requires_grad)


_HERE = reduced.__name__
INERT: dict[tuple[str, str], Any] = {}
LIVE: dict[tuple[str, str], Any] = {
    (_HERE, reduced.reduced.__name__): reduced.call,
    (_HERE, reduced.set_state.__name__): reduced.apply_state,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_sparse_tensor"): _rebuild_sparse_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _on_cpu,
}
