"""The index of a checkpoint file: the offsets of its records, read from its end.

Guarantees: the memory is bounded, whatever the file says. A file that is not an archive of uncompressed, distinct
records has no storages here; that is no error.

What does not belong here: the format of the directory (`central_directory`), fetching (`file`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from async_ckpt.format.central_directory import NOT_UNDERSTOOD, Entry, find_directory, list_entries
from async_ckpt.format.reading.records import Storage, storages_of

__all__ = ["Index", "read_index"]

_TAIL_BYTES = 64 << 10
_LEAD_BYTES = 4 << 10
_SMALL_FILE_BYTES = 256 << 10  # read at once
_LONGEST_DIRECTORY_BYTES = 32 << 20  # torch itself reads longer ones


@dataclass(slots=True, kw_only=True)
class Index:
    """The offsets of the records of one file.

    Attributes:
        has_directory: whether the file ends like a zip archive.
        headers: the entries of its directory, by the offsets of their local headers.
        storages: the records of storages by name, in the probable order of reading; or None.
        kept_from: the offset of ``tail``.
        tail: the end of the file, which was fetched to make the index.
    """

    has_directory: bool = False
    headers: dict[int, Entry] = field(default_factory=dict)
    storages: dict[str, Storage] | None = None
    kept_from: int = 0
    tail: memoryview = field(default_factory=lambda: memoryview(b""))

    def entry(self, name: str) -> Entry | None:
        """Return the entry *name*, given without the archive's name, which torch takes from the first entry."""
        entries = {entry.name: entry for entry in self.headers.values()}
        return entries.get(f"{next(iter(entries), '').partition('/')[0]}/{name}")


def read_index(fetch: Callable[[int, int], memoryview], nbytes: int) -> Index:
    """Read the index from the end of a file.

    Args:
        fetch: returns the bytes between two offsets.
        nbytes: length of the file.
    """
    index = Index()
    tail_bytes = nbytes if nbytes <= _SMALL_FILE_BYTES else _TAIL_BYTES
    tail = fetch(nbytes - tail_bytes, nbytes)
    try:
        start, stop = find_directory(tail, nbytes)
        index.has_directory = True
        if stop - start > _LONGEST_DIRECTORY_BYTES:
            raise ValueError("the directory is too long to be kept in memory")
        missing = nbytes - tail.nbytes - start
        if missing > 0:  # and the records that stand before the directory and are read first
            begin = max(0, start - _LEAD_BYTES)
            tail = memoryview(bytes(fetch(begin, start + missing)) + bytes(tail))
        first = nbytes - tail.nbytes
        entries = list(list_entries(tail[start - first : stop - first]))
        if all(entry.method == 0 for entry in entries):
            index.headers = {entry.header: entry for entry in entries}
            if len(entries) == len(index.headers) == len({entry.name for entry in entries}):
                index.storages = storages_of(entries, start)
    except NOT_UNDERSTOOD:
        pass
    index.kept_from, index.tail = nbytes - tail.nbytes, tail
    return index
