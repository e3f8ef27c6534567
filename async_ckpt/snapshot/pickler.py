"""The picklers that lift bulk data out of a state.

`FilePickler` writes what ``torch.save`` would have pickle write, with holes where things were lifted: whatever
pickle asks of an object, or looks up for it, it asks and looks up now. `ObjectPickler` writes what the objects
themselves are made from again, for a writer that wants those.

What does not belong here: what they have in common (`lifting`), what fills the holes (`filling`).
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
from async_ckpt.snapshot.lifting import (
    DTYPES,
    LONG_TEXT,
    STORED,
    TORCH_WORDS,
    Handler,
    LiftingPickler,
    share,
)
from async_ckpt.snapshot.rebuild import INSTEAD, itself, make_array

__all__ = ["PROTOCOL", "FilePickler", "ObjectPickler"]

PROTOCOL = 2  # what torch.save writes, and asks objects for

# Beyond these, pickle's protocol may have no room for them; it is left to say so itself.
_LONGEST_TEXT = 1 << 30
_LONGEST_BYTES = 2 << 30


class FilePickler(LiftingPickler):
    """Writes the skeleton of a file: the pickle in it, with holes.

    What a hole is filled with may refer to a few objects that the rest refers to as well, such as ``OrderedDict``, and
    is to be referred to by it: those are holes too, wherever they occur.

    Args:
        file: where to.
        words: by their identity, the objects beside strings that a hole is filled with.
        dtypes: tensors of those for which this is true are lifted.
    """

    def __init__(
        self, file: BinaryIO, words: Mapping[int, bytes], dtypes: Mapping[torch.dtype, object]
    ) -> None:
        super().__init__(file, PROTOCOL, dtypes)
        self._words = words
        for kind in (torch.Tensor, torch.nn.Parameter):
            # Whoever says how tensors are pickled is asked, for each; a parameter is pickled with a tensor.
            if kind in copyreg.dispatch_table or torch.Tensor in copyreg.dispatch_table:
                self._handlers[kind] = None

    def reducer_override(self, obj: Any, /) -> Any:
        """Have pickle ask every object itself, but lift the bytes of large arrays out of what numpy would say."""
        if arrays.is_liftable(obj):
            return arrays.reduction(arrays.ArrayBytes(obj))
        return NotImplemented

    def _choose(self, kind: type) -> Handler | None:
        return _word if issubclass(kind, type) else super()._choose(kind)


def _word(pickler: FilePickler, value: Any) -> int | None:
    return share(pickler, value) if id(value) in pickler._words else None


def _text(pickler: LiftingPickler, value: str) -> int | None:
    if LONG_TEXT <= len(value) <= _LONGEST_TEXT or value in TORCH_WORDS:
        return share(pickler, value)
    return None


def _bytes(pickler: LiftingPickler, value: bytes) -> int | None:
    return share(pickler, value) if LONG_TEXT <= len(value) < _LONGEST_BYTES else None


FilePickler.handlers = {
    **STORED,
    str: _text,
    bytes: _bytes,
    FunctionType: _word,
    BuiltinFunctionType: _word,
    torch.dtype: _word,
}


class ObjectPickler(LiftingPickler):
    """Writes what the objects of a state are made from again. Classes and functions are passed by reference.

    Args:
        file: where to.
        shared: objects to pass on by reference, whatever they are.
    """

    def __init__(self, file: BinaryIO, shared: Iterable[Any] = ()) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL, _All(DTYPES), shared)

    def reducer_override(self, obj: Any, /) -> Any:
        """Ask what ``torch.save`` would, and refer to constants themselves, not to their names."""
        if arrays.is_liftable(obj):
            data = arrays.ArrayBytes(obj)
            return make_array, (data, data.dtype, data.shape, "F" if data.is_fortran else "C")
        reducer = copyreg.dispatch_table.get(type(obj))
        value = obj.__reduce_ex__(PROTOCOL) if reducer is None else reducer(obj)
        if isinstance(value, str):
            pickle.dumps(obj, PROTOCOL)  # refuses a name that leads elsewhere
            return itself, (_Held(obj),)
        return value

    def _choose(self, kind: type) -> Handler | None:
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


def _held(pickler: LiftingPickler, held: _Held) -> int:
    return pickler._lift(held, SharedEntry(held.value))


def _by_reference(pickler: LiftingPickler, value: Any) -> int:
    number = pickler._seen.get(id(value))
    if number is None:
        pickle.dumps(value, PROTOCOL)  # refuses what is not there by its name
        number = pickler._lift(value, SharedEntry(value))
    return number


def _function(pickler: LiftingPickler, function: Any) -> int:
    return _by_reference(pickler, INSTEAD.get(function, function))


def _data_type(pickler: LiftingPickler, dtype: Any) -> int | None:
    """Share what cannot change: numpy has one object for it, and what is written depends on that."""
    is_constant = dtype.names is None and dtype.subdtype is None and dtype.metadata is None
    return share(pickler, dtype) if is_constant else None


def _identical(pickler: LiftingPickler, value: str | bytes) -> int | None:
    """Share what is long, and those of which there is one object, which another writer may refer to."""
    if len(value) >= LONG_TEXT or len(value) < 2 or value in TORCH_WORDS:
        return share(pickler, value)
    return None


ObjectPickler.handlers = {
    **STORED,
    str: _identical,
    bytes: _identical,
    _Held: _held,
    FunctionType: _function,
}
