"""The pickle in a checkpoint, made from the entries of a snapshot: no tensor and no storage exists meanwhile.

Guarantees: these are the bytes that torch's own pickler writes for the state, where torch pickles tensors and
storages as it did in every version so far; whether it does is not for this module to say (`writing`).

What a tensor is rebuilt with is asked of torch, once for each dtype.
"""

from __future__ import annotations

import copyreg
import pickle
from collections import OrderedDict
from functools import cache
from typing import Any, BinaryIO

import torch

from async_ckpt.snapshot import Storages
from async_ckpt.snapshot.entries import StorageEntry, TensorEntry

__all__ = ["PicturePickler"]


class PicturePickler(pickle.Pickler):
    """Pickles a picture in which entries stand for tensors and storages.

    Args:
        file: where to.
        storages: what the entries refer to by number.

    Attributes:
        keys: the names that storages have in the file, by number, in the order in which they were met.
    """

    def __init__(self, file: BinaryIO, storages: Storages) -> None:
        super().__init__(file, protocol=torch.serialization.DEFAULT_PROTOCOL)
        self.dispatch_table = {**copyreg.dispatch_table, TensorEntry: _reduce, _NoHooks: _reduce_no_hooks}
        self.keys: dict[int, str] = {}
        self._storages = storages

    def persistent_id(self, obj: Any, /) -> tuple[str, type, str, str, int] | None:
        """Return what refers to a storage, ``None`` for anything else."""
        if type(obj) is not StorageEntry:
            return None
        index, dtype = obj
        nbytes, location, _ = self._storages[index]
        key = self.keys.setdefault(index, str(len(self.keys)))
        if ":" in location:  # torch makes such a name anew each time, so that pickle writes it each time
            location = location[:1] + location[1:]
        kind, itemsize = _storage_type(dtype)
        return "storage", kind, key, location, nbytes // itemsize


class _NoHooks:
    """An empty ``OrderedDict``, which would take pickle five times as long."""

    __slots__ = ()


def _reduce_no_hooks(_: _NoHooks) -> tuple[Any, ...]:
    return OrderedDict, ()


def _reduce(entry: TensorEntry) -> tuple[Any, ...]:
    """Return what ``Tensor.__reduce_ex__`` and ``Parameter.__reduce_ex__`` return."""
    index, dtype, offset, size, stride, requires_grad, is_parameter = entry
    if is_parameter:
        data = TensorEntry(index, dtype, offset, size, stride, False, False)
        return torch._utils._rebuild_parameter, (data, requires_grad, _NoHooks())
    rebuild, storage_dtype, more = _reduction(dtype)
    storage = StorageEntry(index, storage_dtype)
    return rebuild, (storage, offset, tuple(size), stride, requires_grad, _NoHooks(), *more)


@cache
def _reduction(dtype: torch.dtype) -> tuple[Any, torch.dtype | None, tuple[Any, ...]]:
    """Ask torch what rebuilds a tensor, from a storage of which dtype, and what it takes beside the usual."""
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    rebuild, arguments = tensor.__reduce_ex__(torch.serialization.DEFAULT_PROTOCOL)
    return rebuild, dtype if isinstance(arguments[0], torch.TypedStorage) else None, arguments[6:]


@cache
def _storage_type(dtype: torch.dtype | None) -> tuple[type, int]:
    """Return what a storage is called in the file, and the bytes that its length there is counted in."""
    if dtype is None:
        return torch.UntypedStorage, 1
    return getattr(torch, torch.storage._dtype_to_storage_type_map()[dtype]), dtype.itemsize
