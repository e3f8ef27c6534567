"""The pickler that lifts bulk data out of a state.

Guarantees: the skeleton it writes is a copy of everything but what it lifted; what it lifted is kept
alive here, so no identity is reused during the walk. A plain tensor costs a few microseconds.

It runs in C but for one call for each object, `persistent_id`, and one for each object that is not
a builtin, ``reducer_override``. Tensors that are in any way special go through their own
``__reduce_ex__``, which leads here again by their storages.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import torch

from async_ckpt.snapshot.copying import bytes_of
from async_ckpt.snapshot.entries import ArrayEntry, Entry, SharedEntry, StorageEntry, TensorEntry
from async_ckpt.snapshot.locations import location_of
from async_ckpt.snapshot.reduced import reduce
from async_ckpt.snapshot.xla import value_id

__all__ = ["Lifted", "LiftingPickler"]

_SHARED_LENGTH = 64 << 10  # immutable values from this length on are passed by reference

# torch.save writes these very objects, and once each: a state that holds one must go on holding that one. Python has
# more than one object for a text of one character; unpickled, it would be one.
_TORCH_WORDS = frozenset({"cpu", "storage"})

# Until torch 2.12.
_has_names: Callable[[torch.Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)

# Tensors of these dtypes are saved with an UntypedStorage, which torch counts as one of uint8.
_UNTYPED_DTYPES: frozenset[torch.dtype] = frozenset(torch.storage._new_dtypes())
# Before torch 2.5 there are dtypes that torch.save refuses; its own code is left to say so.
_DTYPES = _UNTYPED_DTYPES | frozenset(torch.storage._dtype_to_storage_type_map())


@dataclass(slots=True, kw_only=True)
class Lifted:
    """What was lifted out.

    Attributes:
        entries: what the skeleton refers to by number.
        storages: each storage once, as a tensor of its bytes.
        sizes: their sizes in bytes.
        locations: what ``torch.save`` would write for each.
        arrays: the place in ``entries`` of each numpy array, and the array.
        remotes: the place in ``storages`` of what is to be brought by value, and the tensor.
    """

    entries: list[Entry] = field(default_factory=list)
    storages: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    arrays: list[tuple[int, Any]] = field(default_factory=list)
    remotes: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class LiftingPickler(pickle.Pickler):
    """Writes the skeleton of a state.

    Args:
        file: where to.
        shared: objects to pass on by reference, whatever they are.
    """

    def __init__(self, file: BinaryIO, shared: Iterable[Any]) -> None:
        super().__init__(file, protocol=5)
        self.lifted = Lifted()
        self._handlers = _Handlers(_HANDLERS)
        self._shared = {id(value): value for value in shared}
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        self._indices: dict[int, int] = {}
        self._remote_indices: dict[int, int] = {}
        self._dtypes: list[torch.dtype] = []

    def persistent_id(self, obj: Any, /) -> int | None:
        """Return the number of what is lifted out, ``None`` for what is pickled."""
        handler = self._handlers[type(obj)]
        if self._shared and id(obj) in self._shared:
            return self._lift(obj, SharedEntry(obj))
        return None if handler is None else handler(self, obj)

    def reducer_override(self, obj: Any, /) -> Any:
        """Store how to rebuild *obj*, so that a rebuild may be inert."""
        return reduce(obj)

    def _lift(self, obj: Any, entry: Entry) -> int:
        number = self._seen[id(obj)] = len(self.lifted.entries)
        self.lifted.entries.append(entry)
        self._kept.append(obj)
        return number

    def _storage(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> int:
        index = self._indices.get(storage._cdata)
        if index is None:
            return self._new_storage(storage, dtype)
        if self._dtypes[index] is not dtype and self.lifted.sizes[index]:
            raise RuntimeError(
                "Cannot save multiple tensors or storages that view the same data as different types "
                f"({self._dtypes[index]} and {dtype})"
            )
        return index

    def _new_storage(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> int:
        location = location_of(storage)
        if location == "meta":
            raise RuntimeError("a storage on the meta device has no data to save")
        index = self._indices[storage._cdata] = self._add_storage(storage, location, dtype)
        return index

    def _remote(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        """Return the storage that the value of a tensor without memory gets; in the file it is one of the CPU's."""
        number = value_id(tensor)
        index = self._remote_indices.get(number)
        if index is None:
            empty = torch.UntypedStorage(tensor.nbytes, device="meta")
            index = self._remote_indices[number] = self._add_storage(empty, "cpu", dtype)
            if tensor.nbytes:
                self.lifted.remotes.append((index, tensor))
        return index

    def _add_storage(self, storage: torch.UntypedStorage, location: str, dtype: torch.dtype) -> int:
        self.lifted.storages.append(bytes_of(storage))
        self.lifted.sizes.append(storage.nbytes())
        self.lifted.locations.append(location)
        self._dtypes.append(dtype)
        return len(self._dtypes) - 1


_Handler: TypeAlias = Callable[[LiftingPickler, Any], int | None]


class _Handlers(dict[type, "_Handler | None"]):
    """What to do with an object, by its exact type; made anew for each walk, so it keeps no type alive."""

    def __missing__(self, kind: type) -> _Handler | None:
        handler = self[kind] = _choose(kind)
        return handler


def _choose(kind: type) -> _Handler | None:
    if issubclass(kind, torch.TypedStorage):
        return _typed_storage
    if issubclass(kind, torch.UntypedStorage) or kind in torch._storage_classes:
        return _untyped_storage
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "ndarray"):
        if kind is numpy.ndarray:
            return _array
        if issubclass(kind, numpy.dtype):
            return _share  # they are compared by identity when they are written
    return None


def _tensor(pickler: LiftingPickler, tensor: torch.Tensor) -> int | None:
    if tensor._backward_hooks and tensor.device.type != "xla":
        return None  # torch warns of hooks
    return _parameter(pickler, tensor)


def _parameter(pickler: LiftingPickler, tensor: torch.Tensor) -> int | None:
    number = pickler._seen.get(id(tensor))
    if number is not None:
        return number
    if (
        tensor.layout is not torch.strided
        or not (tensor.is_cpu or tensor.is_cuda)
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.__dict__
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor._is_zerotensor()  # has no memory; torch refuses it
        or (_has_names is not None and _has_names(tensor))  # torch refuses those, too
    ):
        return _on_xla(pickler, tensor) if tensor.device.type == "xla" else None
    dtype = tensor.dtype
    if dtype not in _DTYPES:
        return None
    storage = tensor.untyped_storage()
    index = pickler._storage(storage, torch.uint8 if dtype in _UNTYPED_DTYPES else dtype)
    if not pickler.lifted.sizes[index] and tensor.numel():
        return None  # a freed storage: torch saves such a tensor, but cannot make one again
    entry = TensorEntry(
        index,
        dtype,
        int(tensor.storage_offset()),
        tuple(tensor.size()),
        tensor.stride(),
        tensor.requires_grad,
        type(tensor) is not torch.Tensor,
    )
    return pickler._lift(tensor, entry)


def _on_xla(pickler: LiftingPickler, tensor: torch.Tensor) -> int | None:
    is_parameter, dtype = type(tensor) is not torch.Tensor, tensor.dtype
    if dtype not in _DTYPES or (is_parameter and tensor.__dict__):
        return (
            None  # a parameter's data is met again, on its own; torch_xla leaves a tensor's attributes behind
        )
    index = pickler._remote(tensor, torch.uint8 if dtype in _UNTYPED_DTYPES else dtype)
    size = tensor.size()
    stride = torch.empty(size, device="meta").stride()  # as it comes from the device, whatever it was there
    entry = TensorEntry(index, dtype, 0, size, stride, tensor.requires_grad, is_parameter)
    return pickler._lift(tensor, entry)


def _typed_storage(pickler: LiftingPickler, storage: torch.TypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    storage._pickle_storage_type()  # raises where torch.save would
    index = pickler._storage(storage._untyped_storage, storage.dtype)
    return pickler._lift(storage, StorageEntry(index, storage.dtype))


def _untyped_storage(pickler: LiftingPickler, storage: torch.UntypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    return pickler._lift(storage, StorageEntry(pickler._storage(storage, torch.uint8), None))


def _array(pickler: LiftingPickler, array: Any) -> int | None:
    number = pickler._seen.get(id(array))
    if number is not None or array.dtype.hasobject:
        return number
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    number = pickler._lift(array, ArrayEntry(0, array.dtype, array.shape, "F" if fortran else "C"))
    pickler.lifted.arrays.append((number, array))
    return number


def _share(pickler: LiftingPickler, value: Any) -> int:
    number = pickler._seen.get(id(value))
    return pickler._lift(value, SharedEntry(value)) if number is None else number


def _text(pickler: LiftingPickler, value: str | bytes) -> int | None:
    if len(value) >= _SHARED_LENGTH or len(value) < 2 or value in _TORCH_WORDS:
        return _share(pickler, value)
    return None


_HANDLERS: dict[type, _Handler | None] = {
    torch.Tensor: _tensor,
    torch.nn.Parameter: _parameter,
    torch.UntypedStorage: _untyped_storage,
    str: _text,
    bytes: _text,
}
