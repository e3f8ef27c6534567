"""The common base of the two picklers that extract bulk data from a state.

Guarantees: the skeleton they write is a copy of everything but what they extracted; what they extracted is kept alive
here, so no identity is reused during the walk. A plain tensor costs a few microseconds.

They run in C, except one call of `persistent_id` for each object and one of ``reducer_override`` for each object of a
non-builtin type. Special tensors are pickled by their own ``__reduce_ex__``, and get here again with their storages.

What does not belong here: how everything else is pickled (`pickler`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, TypeAlias

import torch

from async_ckpt.errors import StateChangedError
from async_ckpt.snapshot.arrays import ArrayBytes
from async_ckpt.snapshot.columns import Columns, Reader
from async_ckpt.snapshot.entries import ArrayEntry, Entry, SharedEntry, StorageEntry, TensorEntry
from async_ckpt.snapshot.locations import is_plain_cpu, location_of
from async_ckpt.snapshot.sources import Sources, address_of, bytes_of
from async_ckpt.snapshot.xla import value_id

__all__ = [
    "DTYPES",
    "LONG_TEXT",
    "STORED",
    "TORCH_STRINGS",
    "Extracted",
    "ExtractingPickler",
    "Handler",
    "is_lazy_clone",
    "share",
]

LONG_TEXT = 64 << 10  # immutable values from this length on are passed by reference
# Strings that torch.save itself writes, always as the same object: a state that contains that very object must refer to
# it. The names of the first ten storages are such strings, as Python has one object per digit.
TORCH_STRINGS = frozenset({"cpu", "mps", "meta", "storage", "latin1", *"0123456789"})

# Until torch 2.12.
_has_names: Callable[[torch.Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)

# Tensors of these dtypes are saved with an UntypedStorage, whose dtype counts as uint8.
_UNTYPED_DTYPES: frozenset[torch.dtype] = frozenset(torch.storage._new_dtypes())
_STRIDED = torch.strided
_REAL = frozenset(
    (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
)
"""The most usual of the dtypes whose tensors are neither quantized nor conjugates."""
_STORED_AS = dict.fromkeys(_UNTYPED_DTYPES, torch.uint8)
DTYPES: Mapping[torch.dtype, bool] = dict.fromkeys(
    (*_UNTYPED_DTYPES, *torch.storage._dtype_to_storage_type_map()), True
)


@dataclass(slots=True, kw_only=True)
class Extracted:
    """What was extracted out.

    Attributes:
        others: the entries that the skeleton refers to and that are not in `tensors`, by number.
        tensors: the plain tensors, which have the other numbers, in order.
        originals: these tensors themselves.
        sources: the storages, once each.
        locations: the location that ``torch.save`` would write for each.
        arrays: the numpy arrays, each with its number.
        remotes: tensors that are fetched by value, each with its index in ``sources``.
    """

    others: dict[int, Entry] = field(default_factory=dict)
    tensors: Columns = field(default_factory=Columns)
    originals: list[torch.Tensor] = field(default_factory=list)
    sources: Sources = field(default_factory=Sources)
    locations: list[str] = field(default_factory=list)
    arrays: list[tuple[int, ArrayBytes]] = field(default_factory=list)
    remotes: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class ExtractingPickler(pickle.Pickler):
    """A pickler that extracts tensors and storages.

    Args:
        file: receives the pickle.
        protocol: the pickle protocol.
        dtypes: tensors of those for which this is true are extracted.
    """

    handlers: ClassVar[dict[type, Handler | None]]

    def __init__(self, file: BinaryIO, protocol: int, dtypes: Mapping[torch.dtype, object]) -> None:
        super().__init__(file, protocol=protocol)
        self._extracted = Extracted()
        self._handlers = _Handlers(
            self.handlers, type(self)._choose
        )  # else it would be kept, and tensors with it
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # the objects of all entries, by number
        self._reader = Reader()
        self._unread: list[torch.Tensor] = []
        self._indices: dict[int, int] = {}
        self._addresses: dict[int, torch.dtype] = {}
        self._remote_indices: dict[int, int] = {}
        self._dtypes: list[torch.dtype] = []
        self._liftable = dtypes

    def persistent_id(self, obj: Any, /) -> int | None:
        """Return the number of what is extracted out, ``None`` for what is pickled."""
        handler = self._handlers[type(obj)]
        return None if handler is None else handler(self, obj)

    def reducer_override(self, obj: Any, /) -> Any:
        """Read the tensors before code of the state's is asked, which may change them."""
        if self._unread:
            self._read()
        return NotImplemented

    def extract(self, state: Any) -> Extracted:
        """Pickle *state*, and return what was extracted.

        Raises:
            StateChangedError: another thread has changed a tensor meanwhile.
        """
        self.dump(state)
        self._read()
        extracted, dtypes = self._extracted, self._reader.dtypes
        if not all(map(self._liftable.__getitem__, set(dtypes))):
            raise StateChangedError("a tensor of the state was given another dtype while it was being saved")
        stored = list(map(_STORED_AS.get, dtypes, dtypes))
        quick = None if self._dtypes or not is_plain_cpu() else self._reader.sources(stored)
        if quick is None:
            indices = list(map(self._storage, self._reader.storages, stored))
        else:
            extracted.sources, indices = quick
            extracted.locations = ["cpu"] * len(extracted.sources.owners)
        extracted.tensors, extracted.originals = self._reader.columns(indices), self._reader.tensors
        return extracted

    def _read(self) -> None:
        self._reader.read(self._unread)
        self._unread.clear()

    @classmethod
    def _choose(cls, kind: type) -> Handler | None:
        if issubclass(kind, torch.TypedStorage):
            return _typed_storage
        return _untyped_storage if kind in torch._storage_classes else None

    def _extract(self, obj: Any, entry: Entry) -> int:
        number = self._seen[id(obj)] = len(self._kept)
        self._extracted.others[number] = entry
        self._kept.append(obj)
        return number

    def _storage(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> int:
        index = self._indices.get(storage._cdata)
        if index is None:
            return self._new_storage(storage, dtype)
        if self._dtypes[index] is not dtype and self._extracted.sources.sizes[index]:
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
        """Refuse what torch refuses when it needs the address: missing memory, or memory shared as two types."""
        address = address_of(view)  # not data_ptr(), for which a copy-on-write storage would make its copy
        if not address:
            if storage.nbytes():
                storage.data_ptr()  # says it in torch's words
                raise RuntimeError("a storage without memory has no data to save")
        elif self._addresses.setdefault(address, dtype) is not dtype and not is_lazy_clone(view):
            raise _two_types(self._addresses[address], dtype)

    def _remote(self, tensor: torch.Tensor, dtype: torch.dtype) -> int:
        """Return a storage for the value of a tensor without memory; in the file, its location is the CPU."""
        number = value_id(tensor)
        index = self._remote_indices.get(number)
        if index is None:
            empty = torch.UntypedStorage(tensor.nbytes, device="meta")
            index = self._remote_indices[number] = self._add_storage(empty, bytes_of(empty), "cpu", dtype)
            if tensor.nbytes:
                self._extracted.remotes.append((index, tensor))
        return index

    def _add_storage(
        self, storage: torch.UntypedStorage, view: torch.Tensor, location: str, dtype: torch.dtype
    ) -> int:
        self._extracted.locations.append(location)
        self._dtypes.append(dtype)
        return self._extracted.sources.add(storage, view)


is_lazy_clone: Callable[[torch.Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda _: False)
"""Returns whether the memory is copy-on-write: then each owner has a dtype of its own."""


def _two_types(one: torch.dtype, other: torch.dtype) -> RuntimeError:
    return RuntimeError(
        "Cannot save multiple tensors or storages that view the same data as different types "
        f"({one} and {other})"
    )


Handler: TypeAlias = Callable[[Any, Any], "int | None"]


class _Handlers(dict[type, "Handler | None"]):
    """The handlers of objects, by exact type; made anew for each walk, so that no type is kept alive."""

    def __init__(
        self, known: Mapping[type, Handler | None], choose: Callable[[type], Handler | None]
    ) -> None:
        super().__init__(known)
        self._choose = choose

    def __missing__(self, kind: type) -> Handler | None:
        handler = self[kind] = self._choose(kind)
        return handler


# -- handlers of both picklers


def _tensor(pickler: ExtractingPickler, tensor: torch.Tensor) -> int | None:
    """Note a tensor to be read later, if it is plain; a freed storage does not matter: torch saves such a tensor."""
    number = pickler._seen.get(id(tensor))
    if number is not None:
        return number
    dtype = tensor.dtype
    if (
        tensor.layout is not _STRIDED
        or not (tensor.is_cpu or tensor.is_cuda)
        or tensor.is_nested
        or tensor.__dict__
        or tensor.is_neg()
        or tensor._is_zerotensor()  # has no memory; torch refuses it
        or (dtype not in _REAL and (tensor.is_conj() or tensor.is_quantized))
        or (_has_names is not None and _has_names(tensor))  # torch refuses those, too
        or (tensor._backward_hooks and type(tensor) is torch.Tensor)  # torch warns of them
    ):
        return _on_xla(pickler, tensor) if tensor.device.type == "xla" else None
    if not pickler._liftable[dtype]:
        return None
    kept = pickler._kept
    number = pickler._seen[id(tensor)] = len(kept)
    kept.append(tensor)
    pickler._unread.append(tensor)
    return number


def _on_xla(pickler: ExtractingPickler, tensor: torch.Tensor) -> int | None:
    is_parameter, dtype = type(tensor) is not torch.Tensor, tensor.dtype
    if not pickler._liftable[dtype] or (is_parameter and tensor.__dict__):
        return (
            None  # a parameter's data is met again, on its own; torch_xla leaves a tensor's attributes behind
        )
    index = pickler._remote(tensor, torch.uint8 if dtype in _UNTYPED_DTYPES else dtype)
    size = tensor.size()
    stride = torch.empty(size, device="meta").stride()  # as it comes from the device, whatever it was there
    entry = TensorEntry(index, dtype, 0, tuple(size), stride, tensor.requires_grad, is_parameter)
    return pickler._extract(tensor, entry)


def _typed_storage(pickler: ExtractingPickler, storage: torch.TypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    kind = getattr(torch, storage._pickle_storage_type())  # raises where torch.save would
    index = pickler._storage(storage._untyped_storage, storage.dtype)
    return pickler._extract(storage, StorageEntry(index, storage.dtype, kind, storage._size()))


def _untyped_storage(pickler: ExtractingPickler, storage: torch.UntypedStorage) -> int:
    number = pickler._seen.get(id(storage))
    if number is not None:
        return number
    index = pickler._storage(storage, torch.uint8)
    return pickler._extract(storage, StorageEntry(index, None, torch.UntypedStorage, storage.nbytes()))


def share(pickler: ExtractingPickler, value: Any) -> int:
    """Pass *value* by reference."""
    number = pickler._seen.get(id(value))
    return pickler._extract(value, SharedEntry(value)) if number is None else number


def _array_bytes(pickler: ExtractingPickler, data: ArrayBytes) -> int:
    number = pickler._extract(data, ArrayEntry(0, data.nbytes))
    pickler._extracted.arrays.append((number, data))
    return number


STORED: dict[type, Handler | None] = {
    torch.Tensor: _tensor,
    torch.nn.Parameter: _tensor,
    torch.UntypedStorage: _untyped_storage,
    ArrayBytes: _array_bytes,
}
