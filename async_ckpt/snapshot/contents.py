"""The content of a snapshot beside its bulk data, by its purpose.

Pickle or torch made all of it at the time of the save; nothing here refers to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from async_ckpt.snapshot.columns import Entries
from async_ckpt.snapshot.filling import Skeleton
from async_ckpt.snapshot.torch_format import Record, TorchFormat

__all__ = ["Content", "Nothing", "Objects", "Records", "Unfilled", "Whole"]


class Unfilled(NamedTuple):
    """A file in the known format of this torch; its pickle is yet to be filled."""

    skeleton: Skeleton
    torch_format: TorchFormat


class Records(NamedTuple):
    """A file whose records torch itself has made; storages are given by their numbers."""

    records: Sequence[Record]
    alignment: int


class Whole(NamedTuple):
    """A file that torch itself has written in memory."""

    file: bytes


class Nothing(NamedTuple):
    """Bulk data without a pickle; only the caller knows its meaning."""


class Objects(NamedTuple):
    """The skeleton from which the state's objects are rebuilt."""

    skeleton: bytes
    entries: Entries


Content: TypeAlias = Unfilled | Records | Whole | Objects | Nothing
