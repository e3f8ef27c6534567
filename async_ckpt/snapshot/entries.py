"""What a skeleton refers to by number: the things that pickle lifted out of the state.

Each entry is a plain value that holds nothing of the live state, but for `SharedEntry`, whose value
is immutable or knowingly shared.

In a picture the entries of tensors and storages stand where those were, in sets and as keys too: as those, an entry
equals itself alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

if TYPE_CHECKING:
    import numpy

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

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class StorageEntry(NamedTuple):
    """A storage on its own; ``dtype`` is that of a TypedStorage, ``None`` for an UntypedStorage."""

    storage: int
    dtype: torch.dtype | None

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class ArrayEntry(NamedTuple):
    """A numpy array without objects, whose bytes are at *region* of the buffer."""

    region: int
    dtype: numpy.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]


class SharedEntry(NamedTuple):
    """An object that is passed on as it is."""

    value: Any


Entry: TypeAlias = TensorEntry | StorageEntry | ArrayEntry | SharedEntry
