"""What the two picklers that lift bulk data out of a state have in common.

Guarantees: the skeleton they write is a copy of everything but what they lifted; what they lifted is kept alive
here, so no identity is reused during the walk. A plain tensor costs a few microseconds.

They run in C but for one call for each object, `persistent_id`, and one for each object that is not a builtin,
``reducer_override``. Tensors that are in any way special go through their own ``__reduce_ex__``, which leads here
again by their storages.

What does not belong here: what is written of everything else (`pickler`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, TypeAlias

import torch

from async_ckpt.snapshot.arrays import ArrayBytes
from async_ckpt.snapshot.entries import ArrayEntry, Entry, SharedEntry, StorageEntry, TensorEntry
from async_ckpt.snapshot.host_pool import bytes_of
from async_ckpt.snapshot.locations import location_of
from async_ckpt.snapshot.parallel_copy import const_address
from async_ckpt.snapshot.xla import value_id

__all__ = [
    "DTYPES",
    "LONG_TEXT",
    "STORED",
    "TORCH_WORDS",
    "Handler",
    "Lifted",
    "LiftingPickler",
    "share",
]

LONG_TEXT = 64 << 10  # immutable values from this length on are passed by reference
# Strings that torch.save writes of its own accord, each time the same object: a state that holds that very object
# must refer to it. So are the names of the first ten storages, since Python has one object for a digit.
TORCH_WORDS = frozenset({"cpu", "mps", "meta", "storage", "latin1", *"0123456789"})

# Until torch 2.12.
_has_names: Callable[[torch.Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)

# Tensors of these dtypes are saved with an UntypedStorage, which torch counts as one of uint8.
_UNTYPED_DTYPES: frozenset[torch.dtype] = frozenset(torch.storage._new_dtypes())
DTYPES: Mapping[torch.dtype, bool] = dict.fromkeys(
    (*_UNTYPED_DTYPES, *torch.storage._dtype_to_storage_type_map()), True
)


@dataclass(slots=True, kw_only=True)
class Lifted:
    """What was lifted out.

    Attributes:
        entries: what the skeleton refers to by number.
        owners: each storage once.
        storages: the same, as tensors of bytes.
        sizes: their sizes in bytes.
        owner_sizes: the sizes of the owners, where only parts of them were lifted; else empty.
        locations: what ``torch.save`` would write for each.
        arrays: the numpy arrays, each with its place in the entries.
        remotes: the place in ``storages`` of what is to be brought by value, and the tensor.
    """

    entries: list[Entry] = field(default_factory=list)
    owners: list[torch.UntypedStorage] = field(default_factory=list)
    storages: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    owner_sizes: list[int] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    arrays: list[tuple[int, ArrayBytes]] = field(default_factory=list)
    remotes: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class LiftingPickler(pickle.Pickler):
    """What both picklers have in common.

    Args:
        file: where to.
        protocol: of pickle.
        dtypes: tensors of those for which this is true are lifted.
        shared: objects to pass on by reference, whatever they are.
    """

    handlers: ClassVar[dict[type, Handler | None]]

    def __init__(
        self, file: BinaryIO, protocol: int, dtypes: Mapping[torch.dtype, object], shared: Iterable[Any] = ()
    ) -> None:
        super().__init__(file, protocol=protocol)
        self.lifted = Lifted()
        self._handlers = _Handlers(self.handlers, self._choose)
        self._shared = {id(value): value for value in shared}
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        self._indices: dict[int, int] = {}
        self._addresses: dict[int, torch.dtype] = {}
        self._remote_indices: dict[int, int] = {}
        self._dtypes: list[torch.dtype] = []
        self._liftable = dtypes

    def persistent_id(self, obj: Any, /) -> int | None:
        """Return the number of what is lifted out, ``None`` for what is pickled."""
        handler = self._handlers[type(obj)]
        if self._shared and id(obj) in self._shared:
            return self._lift(obj, SharedEntry(obj))
        return None if handler is None else handler(self, obj)

    def _choose(self, kind: type) -> Handler | None:
        if issubclass(kind, torch.TypedStorage):
            return _typed_storage
        return _untyped_storage if kind in torch._storage_classes else None

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
            raise _two_types(self._dtypes[index], dtype)
        return index

    def _new_storage(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> int:
        location = location_of(storage)
        if location == "meta":
            raise RuntimeError("a storage on the meta device has no data to save")
        view = bytes_of(storage)
        self._check_memory(storage, view, dtype)
        index = self._indices[storage._cdata] = self._add_storage(storage, view, location, dtype)
        return index

    def _check_memory(self, storage: torch.UntypedStorage, view: torch.Tensor, dtype: torch.dtype) -> None:
        """Refuse what torch refuses as it asks for the address: memory that is not there, or lent out as two types."""
        address = const_address(view)  # not data_ptr(), for which a copy-on-write storage would make its copy
        if not address:
            if storage.nbytes():
                storage.data_ptr()  # says it in torch's words
                raise RuntimeError("a storage without memory has no data to save")
        elif self._addresses.setdefault(address, dtype) is not dtype and not _is_lazy_clone(view):
            raise _two_types(self._addresses[address], dtype)

    def _remote(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        """Return the storage that the value of a tensor without memory gets; in the file it is one of the CPU's."""
        number = value_id(tensor)
        index = self._remote_indices.get(number)
        if index is None:
            empty = torch.UntypedStorage(tensor.nbytes, device="meta")
            index = self._remote_indices[number] = self._add_storage(empty, bytes_of(empty), "cpu", dtype)
            if tensor.nbytes:
                self.lifted.remotes.append((index, tensor))
        return index

    def _add_storage(
        self, storage: torch.UntypedStorage, view: torch.Tensor, location: str, dtype: torch.dtype
    ) -> int:
        lifted = self.lifted
        lifted.owners.append(storage)
        lifted.storages.append(view)
        lifted.sizes.append(storage.nbytes())
        lifted.locations.append(location)
        self._dtypes.append(dtype)
        return len(self._dtypes) - 1


def _is_lazy_clone(view: torch.Tensor) -> bool:
    """Return whether the memory is shared until one of its owners is written to: then each has its own type."""
    return bool(getattr(torch._C, "_is_cow_tensor", lambda _: False)(view))


def _two_types(one: torch.dtype, other: torch.dtype) -> RuntimeError:
    return RuntimeError(
        "Cannot save multiple tensors or storages that view the same data as different types "
        f"({one} and {other})"
    )


Handler: TypeAlias = Callable[[Any, Any], "int | None"]


class _Handlers(dict[type, "Handler | None"]):
    """What to do with an object, by its exact type; made anew for each walk, so it keeps no type alive."""

    def __init__(
        self, known: Mapping[type, Handler | None], choose: Callable[[type], Handler | None]
    ) -> None:
        super().__init__(known)
        self._choose = choose

    def __missing__(self, kind: type) -> Handler | None:
        handler = self[kind] = self._choose(kind)
        return handler


# -- what both lift


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
    if not pickler._liftable[dtype]:
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
    if not pickler._liftable[dtype] or (is_parameter and tensor.__dict__):
        return (
            None  # a parameter's data is met again, on its own; torch_xla leaves a tensor's attributes behind
        )
    index = pickler._remote(tensor, torch.uint8 if dtype in _UNTYPED_DTYPES else dtype)
    size = tensor.size()
    stride = torch.empty(size, device="meta").stride()  # as it comes from the device, whatever it was there
    entry = TensorEntry(index, dtype, 0, tuple(size), stride, tensor.requires_grad, is_parameter)
    return pickler._lift(tensor, entry)


def _typed_storage(pickler: LiftingPickler, storage: torch.TypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    kind = getattr(torch, storage._pickle_storage_type())  # raises where torch.save would
    index = pickler._storage(storage._untyped_storage, storage.dtype)
    return pickler._lift(storage, StorageEntry(index, storage.dtype, kind, storage._size()))


def _untyped_storage(pickler: LiftingPickler, storage: torch.UntypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    index = pickler._storage(storage, torch.uint8)
    return pickler._lift(storage, StorageEntry(index, None, torch.UntypedStorage, storage.nbytes()))


def share(pickler: LiftingPickler, value: Any) -> int:
    """Pass *value* on by reference."""
    number = pickler._seen.get(id(value))
    return pickler._lift(value, SharedEntry(value)) if number is None else number


def _array_bytes(pickler: LiftingPickler, data: ArrayBytes) -> int:
    number = pickler._lift(data, ArrayEntry(0, data.nbytes))
    pickler.lifted.arrays.append((number, data))
    return number


STORED: dict[type, Handler | None] = {
    torch.Tensor: _tensor,
    torch.nn.Parameter: _parameter,
    torch.UntypedStorage: _untyped_storage,
    ArrayBytes: _array_bytes,
}
