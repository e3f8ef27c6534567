"""The picklers that extract bulk data from a state.

`FilePickler` writes the pickle of ``torch.save``, with holes for what was extracted: everything that pickle calls or
looks up for an object, it calls and looks up now. `ObjectPickler` writes a skeleton from which the objects themselves
are rebuilt, for a writer that needs them.

What does not belong here: the extraction (`extraction`), filling the holes (`filling`).
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any, BinaryIO

import torch

from async_ckpt.snapshot import arrays
from async_ckpt.snapshot.entries import SharedEntry
from async_ckpt.snapshot.extraction import (
    DTYPES,
    LONG_TEXT,
    STORED,
    TORCH_STRINGS,
    ExtractingPickler,
    Handler,
    share,
)
from async_ckpt.snapshot.rebuild import INSTEAD, itself, make_array

__all__ = ["PROTOCOL", "FilePickler", "ObjectPickler"]

PROTOCOL = 2  # what torch.save writes, and asks objects for

# Longer ones may not fit pickle's protocol; pickle itself raises then.
_LONGEST_TEXT = 1 << 30
_LONGEST_BYTES = 2 << 30


class FilePickler(ExtractingPickler):
    """Writes the skeleton of a file: its pickle, with holes.

    The content of a hole may share objects with the rest of the pickle, such as ``OrderedDict``: wherever these occur,
    they are holes, too.

    Args:
        file: where to.
        global_names: by identity, the objects, other than strings, that the content of a hole refers to.
        dtypes: maps the dtypes of tensors to extract to a true value.
    """

    def __init__(
        self, file: BinaryIO, global_names: Mapping[int, bytes], dtypes: Mapping[torch.dtype, object]
    ) -> None:
        super().__init__(file, PROTOCOL, dtypes)
        self._global_names = global_names
        for kind in (torch.Tensor, torch.nn.Parameter):
            # Registered reducers of tensors are called for each; the pickle of a parameter contains a tensor.
            if kind in copyreg.dispatch_table or torch.Tensor in copyreg.dispatch_table:
                self._handlers[kind] = None

    def persistent_id(self, obj: Any, /) -> int | None:
        """Return the number of what is extracted out, ``None`` for what is pickled."""
        if type(obj) is str and len(obj) < LONG_TEXT and obj not in TORCH_STRINGS:
            return None  # at once, as there is a name for each tensor
        handler = self._handlers[type(obj)]
        return None if handler is None else handler(self, obj)

    def reducer_override(self, obj: Any, /) -> Any:
        """Let pickle reduce every object, but extract the bytes of large arrays from numpy's reduction."""
        if arrays.is_extractable(obj):
            return arrays.reduction(arrays.ArrayBytes(obj))
        return super().reducer_override(obj)

    @classmethod
    def _choose(cls, kind: type) -> Handler | None:
        return _global_name if issubclass(kind, type) else super()._choose(kind)


def _global_name(pickler: FilePickler, value: Any) -> int | None:
    return share(pickler, value) if id(value) in pickler._global_names else None


def _text(pickler: ExtractingPickler, value: str) -> int | None:
    if LONG_TEXT <= len(value) <= _LONGEST_TEXT or value in TORCH_STRINGS:
        return share(pickler, value)
    return None


def _bytes(pickler: ExtractingPickler, value: bytes) -> int | None:
    return share(pickler, value) if LONG_TEXT <= len(value) < _LONGEST_BYTES else None


FilePickler.handlers = {
    **STORED,
    str: _text,
    bytes: _bytes,
    FunctionType: _global_name,
    BuiltinFunctionType: _global_name,
    torch.dtype: _global_name,
}


class ObjectPickler(ExtractingPickler):
    """Writes the skeleton from which a state's objects are rebuilt. Classes and functions are passed by reference.

    Args:
        file: where to.
        shared: objects to pass by reference, of any type.
    """

    def __init__(self, file: BinaryIO, shared: Iterable[Any] = ()) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL, _All(DTYPES))
        self._shared = {id(value): value for value in shared}

    def persistent_id(self, obj: Any, /) -> int | None:
        """Return the number of what is extracted out, ``None`` for what is pickled."""
        if id(obj) in self._shared:
            return self._extract(obj, SharedEntry(obj))
        return super().persistent_id(obj)

    def reducer_override(self, obj: Any, /) -> Any:
        """Reduce objects as ``torch.save`` would, but refer to constants themselves, not to their names."""
        if arrays.is_extractable(obj):
            data = arrays.ArrayBytes(obj)
            return make_array, (data, data.dtype, data.shape, "F" if data.is_fortran else "C")
        super().reducer_override(obj)
        reducer = copyreg.dispatch_table.get(type(obj))
        value = obj.__reduce_ex__(PROTOCOL) if reducer is None else reducer(obj)
        if isinstance(value, str):
            pickle.dumps(obj, PROTOCOL)  # refuses a name that leads elsewhere
            return itself, (_Held(obj),)
        return value

    @classmethod
    def _choose(cls, kind: type) -> Handler | None:
        if kind is type or (issubclass(kind, type) and kind not in copyreg.dispatch_table):
            return _by_reference
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and issubclass(kind, getattr(numpy, "dtype", ())):
            return _data_type
        return super()._choose(kind)


class _All(dict[torch.dtype, bool]):
    def __missing__(self, dtype: torch.dtype) -> bool:
        return (
            False  # before torch 2.5 there are dtypes that torch.save refuses; its own code is left to say so
        )


class _Held:
    """Stands for a constant."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _held(pickler: ExtractingPickler, held: _Held) -> int:
    return pickler._extract(held, SharedEntry(held.value))


def _by_reference(pickler: ExtractingPickler, value: Any) -> int:
    number = pickler._seen.get(id(value))
    if number is None:
        pickle.dumps(value, PROTOCOL)  # refuses what is not there by its name
        number = pickler._extract(value, SharedEntry(value))
    return number


def _function(pickler: ExtractingPickler, function: Any) -> int:
    return _by_reference(pickler, INSTEAD.get(function, function))


def _data_type(pickler: ExtractingPickler, dtype: Any) -> int | None:
    """Share an immutable dtype: numpy has one object for it, and the file depends on that identity."""
    is_constant = dtype.names is None and dtype.subdtype is None and dtype.metadata is None
    return share(pickler, dtype) if is_constant else None


def _identical(pickler: ExtractingPickler, value: str | bytes) -> int | None:
    """Share long strings, and strings that exist once, which another writer may refer to."""
    if len(value) >= LONG_TEXT or len(value) < 2 or value in TORCH_STRINGS:
        return share(pickler, value)
    return None


ObjectPickler.handlers = {
    **STORED,
    str: _identical,
    bytes: _identical,
    _Held: _held,
    FunctionType: _function,
}
