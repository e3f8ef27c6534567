"""The layout of a file, kept for the next one: most saves of a training differ in bytes and a few numbers alone.

Guarantees: a file is laid out like the one before only if torch would lay it out so: the pickle has the same opcodes
and lengths, and tensors and storages have the same sizes, dtypes and ties. Then its small parts are those of the file
before, with the values that changed in their places; checksums are left to `layout`. Kept layouts are never changed, so
several files may be laid out by one at once. No byte of a storage is kept.

What does not belong here: where a layout is kept, and for how long (`HostPool.keep`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias

from async_ckpt.format.writing.archive import Records
from async_ckpt.format.writing.recorder import INLINE_BYTES, Reference, Segment
from async_ckpt.snapshot import Snapshot
from async_ckpt.snapshot.contents import Unfilled
from async_ckpt.snapshot.entries import ArrayEntry, Entry, SharedEntry
from async_ckpt.snapshot.extraction import LONG_TEXT
from async_ckpt.snapshot.filling import Filled, Runs
from async_ckpt.snapshot.host_pool import MOST_KEPT_BYTES
from async_ckpt.snapshot.patching import find_patches
from async_ckpt.snapshot.torch_format import Record

__all__ = ["Kept", "Shape", "keep"]

_SEGMENT_BYTES = 1 << 20  # longer ones would be made with the GIL held for milliseconds
_OBJECT_BYTES = 330  # what Python takes for what it says of a tensor, and of a storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Where everything is in a file.

    Attributes:
        nbytes: the length of the file.
        starts: where its segments begin.
        records: the records of the archive.
        tail: from where on the bytes depend on the checksums of all records.
        fingerprint: the record that does, if any.
    """

    nbytes: int
    starts: Sequence[int]
    records: Records
    tail: int
    fingerprint: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joined:
    """A segment: pieces of the file, and between them the bytes of small storages."""

    pieces: list[bytes]
    storages: list[int]

    def join(self, snapshot: Snapshot) -> bytearray:
        """Return the segment with the storages of *snapshot*."""
        parts: list[bytes | memoryview] = [b""] * (2 * len(self.storages) + 1)
        parts[0::2] = self.pieces
        parts[1::2] = snapshot.views(self.storages)
        return bytearray().join(parts)


_Part: TypeAlias = "_Joined | bytes | Reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The layout of a file. Made by `keep`.

    Attributes:
        shape: of the file.
        nbytes: about how much memory this takes.
    """

    shape: Shape
    nbytes: int
    _content: Unfilled
    _runs: Runs
    _pickle_start: int
    _parts: list[_Part] = field(default_factory=list)

    def segments(self, snapshot: Snapshot) -> list[Segment] | None:
        """Return the segments of the file of *snapshot*, without checksums; ``None`` if its layout is another."""
        content = snapshot.unfilled
        if content is None or not _are_alike(self._content, content):
            return None
        patches = find_patches(self._content.skeleton.pickle, content.skeleton.pickle, self._runs)
        if patches is None:
            return None
        segments = [_segment(part, snapshot) for part in self._parts]
        for at, value in patches:
            place = self._pickle_start + at
            index = bisect_right(self.shape.starts, place) - 1
            segment = segments[index]
            assert isinstance(segment, bytearray), "the pickle is no storage"
            segment[place - self.shape.starts[index]] = value
        return segments


def keep(
    content: Unfilled,
    filled: Filled,
    written: Sequence[Record],
    segments: Sequence[Segment],
    shape: Shape,
) -> Kept | None:
    """Keep a layout; ``None`` if the next file could not be laid out by it.

    Args:
        content: of the snapshot.
        filled: its pickle.
        written: the records that torch was given.
        segments: what torch made of them.
        shape: of the file.
    """
    is_long = 2 * len(filled.pickle) > MOST_KEPT_BYTES
    if is_long or any(map(_is_large, content.skeleton.entries.others.values())):
        return None
    records = shape.records
    by_name = {name.partition("/")[2]: number for number, name in enumerate(records.names)}
    small: list[tuple[int, int, int]] = []  # where storages are among the small parts, and which
    for name, number in written:
        if isinstance(number, int) and 0 < content.skeleton.sizes[number] <= INLINE_BYTES:
            record = by_name[name]
            small.append((records.starts[record], records.stops[record], number))
    parts = _cut(segments, shape.starts, sorted(small))
    starts = list(accumulate((_length(part, content.skeleton.sizes) for part in parts), initial=0))
    return Kept(
        shape=Shape(
            nbytes=shape.nbytes,
            starts=starts[:-1],
            records=records,
            tail=shape.tail,
            fingerprint=shape.fingerprint,
        ),
        nbytes=_nbytes(content, parts),
        _content=content,
        _runs=filled.runs,
        _pickle_start=records.starts[by_name["data.pkl"]],
        _parts=parts,
    )


def _are_alike(one: Unfilled, other: Unfilled) -> bool:
    """Return whether two files can differ in bytes of storages and in their skeletons alone."""
    old, new = one.skeleton, other.skeleton
    return (
        one.torch_format is other.torch_format
        and old.sizes == new.sizes
        and old.locations == new.locations
        and old.entries.tensors == new.entries.tensors
        and _are_same(old.entries.others, new.entries.others)
    )


def _are_same(some: Mapping[int, Entry], others: Mapping[int, Entry]) -> bool:
    return some.keys() == others.keys() and all(
        _is_same(entry, others[number]) for number, entry in some.items()
    )


def _is_same(one: Entry, other: Entry) -> bool:
    if isinstance(one, SharedEntry):  # equal is not enough: pickle refers to what is the same object
        return isinstance(other, SharedEntry) and one.value is other.value
    return one == other


def _is_large(entry: Entry) -> bool:
    """Return whether the pickle contains bulk data, which may take another length with other values."""
    if isinstance(entry, SharedEntry):
        return isinstance(entry.value, (str, bytes)) and len(entry.value) >= LONG_TEXT
    return isinstance(entry, ArrayEntry)


def _cut(
    segments: Sequence[Segment], starts: Sequence[int], small: Sequence[tuple[int, int, int]]
) -> list[_Part]:
    """Cut the storages *small* out of segments; they have a start, a stop and a number."""
    parts: list[_Part] = []
    remaining = iter([*small, (starts[-1] + len(segments[-1]), 0, 0)])
    start, stop, number = next(remaining)
    for segment, begin in zip(segments, starts, strict=True):
        if isinstance(segment, Reference):
            parts.append(segment)
            continue
        at, pieces, storages = begin, [], []
        while start < begin + len(segment):
            pieces.append(bytes(segment[at - begin : start - begin]))
            storages.append(number)
            at = stop
            start, stop, number = next(remaining)
            if len(storages) * INLINE_BYTES >= _SEGMENT_BYTES:
                parts.append(_Joined(pieces=[*pieces, b""], storages=storages))
                pieces, storages = [], []
        last = bytes(segment[at - begin :])
        parts.append(_Joined(pieces=[*pieces, last], storages=storages) if storages else last)
    return parts


def _segment(part: _Part, snapshot: Snapshot) -> Segment:
    if isinstance(part, Reference):
        return part
    return bytearray(part) if isinstance(part, bytes) else part.join(snapshot)


def _length(part: _Part, sizes: Sequence[int]) -> int:
    if not isinstance(part, _Joined):
        return len(part)
    return sum(map(len, part.pieces)) + sum(map(sizes.__getitem__, part.storages))


def _nbytes(content: Unfilled, parts: Sequence[_Part]) -> int:
    pieces = sum(sum(map(len, part.pieces)) for part in parts if isinstance(part, _Joined))
    pieces += sum(len(part) for part in parts if isinstance(part, bytes))
    count = len(content.skeleton.sizes) + len(content.skeleton.entries.tensors.kinds)
    return pieces + len(content.skeleton.pickle) + count * _OBJECT_BYTES
