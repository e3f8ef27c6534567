"""Which records of an archive hold storages, and in which order a file is probably read. Pure.

What does not belong here: the directory's format (`directory`), fetching (`readahead`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from async_ckpt.format.directory import Entry

__all__ = ["Storage", "reading_order", "storages_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A record that holds a tensor's storage.

    Attributes:
        name: as in the archive.
        start: where its local header begins.
        stop: where what comes after it in the file begins.
    """

    name: str
    start: int
    stop: int


def storages_of(entries: Sequence[Entry], stop: int) -> dict[str, Storage]:
    """Return the records of storages by name, in the order in which they are probably read.

    Args:
        entries: of all records.
        stop: where the last of them ends.
    """
    ends = {}
    for entry in sorted(entries, key=lambda entry: entry.header, reverse=True):
        ends[entry.name] = stop
        stop = entry.header
    found = [entry for entry in entries if _number(entry.name) is not None]
    # Older torch writes storages in the order of their numbers as text, and reads them in that of the numbers.
    found.sort(key=lambda entry: _number(entry.name) or 0)
    return {
        entry.name: Storage(name=entry.name, start=entry.header, stop=ends[entry.name]) for entry in found
    }


def reading_order(
    nbytes: int, storages: Mapping[str, Storage] | None, *, skipped: Collection[str]
) -> list[tuple[int, int]]:
    """Return what will be read, in order: what is no storage, and then storages by their numbers.

    Args:
        nbytes: length of the file.
        storages: from `storages_of`; None where the file is no archive.
        skipped: the names of storages that will not be read.

    Returns:
        Where each range begins and ends.
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
    """Return the number of the storage that a record is of, if it is one."""
    way = name.split("/")
    return int(way[2]) if len(way) == 3 and way[1] == "data" and way[2].isdecimal() else None


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that follow each other, or nearly so: a small gap costs less than a request."""
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
