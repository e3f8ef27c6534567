"""The entries that a skeleton refers to by number: what was extracted from the state while it was pickled.

Each entry is a plain value without references to the live state, except `SharedEntry`, whose value is immutable or
shared on purpose.
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
    """A storage without a tensor: *dtype* is a TypedStorage's; *kind* and *length* are what torch writes."""

    storage: int
    dtype: torch.dtype | None
    kind: type
    length: int


class ArrayEntry(NamedTuple):
    """The bytes of a numpy array, at *region* of the buffer."""

    region: int
    nbytes: int


class SharedEntry(NamedTuple):
    """An object that is passed by reference."""

    value: Any


Entry: TypeAlias = TensorEntry | StorageEntry | ArrayEntry | SharedEntry
