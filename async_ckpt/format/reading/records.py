"""Which records of an archive are storages, and the probable order of reading. Pure.

What does not belong here: the format of the directory (`central_directory`), fetching (`readahead`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from async_ckpt.format.central_directory import Entry

__all__ = ["Storage", "reading_order", "storages_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The record of a storage.

    Attributes:
        name: as in the archive.
        start: the offset of its local header.
        stop: the offset of what follows it in the file.
    """

    name: str
    start: int
    stop: int


def storages_of(entries: Sequence[Entry], stop: int) -> dict[str, Storage]:
    """Return the records of storages by name, in the probable order of reading.

    Args:
        entries: the entries of all records.
        stop: the end of the last one.
    """
    ends = {}
    for entry in sorted(entries, key=lambda entry: entry.header, reverse=True):
        ends[entry.name] = stop
        stop = entry.header
    found = [entry for entry in entries if _number(entry.name) is not None]
    # Older versions of torch write storages sorted by their names as text, and read them in numerical order.
    found.sort(key=lambda entry: _number(entry.name) or 0)
    return {
        entry.name: Storage(name=entry.name, start=entry.header, stop=ends[entry.name]) for entry in found
    }


def reading_order(
    nbytes: int, storages: Mapping[str, Storage] | None, *, skipped: Collection[str]
) -> list[tuple[int, int]]:
    """Return the ranges to read, in order: everything that is no storage, then storages by number.

    Args:
        nbytes: length of the file.
        storages: from `storages_of`; None if the file is no archive.
        skipped: the names of storages not to read.

    Returns:
        The beginning and end of each range.
    """
    if storages is None:
        return [(0, nbytes)]
    others = []
    at = 0
    for place in sorted(storages.values(), key=lambda place: place.start):
        others.append((at, place.start))
        at = place.stop
    head, *rest = [*others, (at, nbytes)]
    early = [(place.start, place.stop) for name, place in storages.items() if name not in skipped]
    return _joined([head, *early, *rest])


def _number(name: str) -> int | None:
    """Return the storage number of a record; None if it is not a storage."""
    way = name.split("/")
    return int(way[2]) if len(way) == 3 and way[1] == "data" and way[2].isdecimal() else None


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that are adjacent or nearly so: a small gap costs less than a request."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start >= stop:
            continue
        if joined:
            before, end = joined[-1]
            if 0 <= start - end <= max(1024, (end - before) // 8):
                joined[-1] = (before, stop)
                continue
        joined.append((start, stop))
    return joined
