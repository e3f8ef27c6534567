"""What a skeleton refers to by number: the things that were lifted out of the state while it was pickled.

Each entry is a plain value that holds nothing of the live state, but for `SharedEntry`, whose value is immutable or
knowingly shared.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

__all__ = ["ArrayEntry", "Entry", "SharedEntry", "StorageEntry", "TensorEntry"]


class TensorEntry(NamedTuple):
    """A plain strided tensor or Parameter without Python state."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    is_parameter: bool


class StorageEntry(NamedTuple):
    """A storage on its own: *dtype* is that of a TypedStorage, *kind* and *length* are what torch writes of it."""

    storage: int
    dtype: torch.dtype | None
    kind: type
    length: int


class ArrayEntry(NamedTuple):
    """The bytes of a numpy array, at *region* of the buffer."""

    region: int
    nbytes: int


class SharedEntry(NamedTuple):
    """An object that is passed on as it is."""

    value: Any


Entry: TypeAlias = TensorEntry | StorageEntry | ArrayEntry | SharedEntry
