"""What a snapshot holds beside bulk data, by what it was taken for.

All of it was made, by pickle or by torch, at the time of the save; nothing here refers to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from async_ckpt.snapshot.conventions import Convention, Record
from async_ckpt.snapshot.entries import Entry
from async_ckpt.snapshot.filling import Skeleton

__all__ = ["Content", "Nothing", "Objects", "Records", "Unfilled", "Whole"]


class Unfilled(NamedTuple):
    """A file by the convention of a torch that is known: its pickle is yet to be filled."""

    skeleton: Skeleton
    convention: Convention


class Records(NamedTuple):
    """A file whose records torch itself has given, storages by their number."""

    records: Sequence[Record]
    alignment: int


class Whole(NamedTuple):
    """A file that torch itself has written to memory."""

    file: bytes


class Nothing(NamedTuple):
    """Bulk data alone; what it means, whoever asked for it knows."""


class Objects(NamedTuple):
    """What the objects of the state are made from again."""

    skeleton: bytes
    entries: Sequence[Entry]


Content: TypeAlias = Unfilled | Records | Whole | Objects | Nothing
