"""How storages are read into the memory that torch made for them: by large ranges that go over many records. Pure.

Guarantees: a range covers the records that it is said to and what stands between them, which goes aside; there
the local headers are, by which it is checked that the records begin where torch was expected to put them.

What does not belong here: making the requests (`readahead`), waiting for them (`file`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from async_ckpt.format.checksum import crc32, crc32_combine
from async_ckpt.format.directory import LOCAL_HEADER, NOT_UNDERSTOOD, Entry, data_start

__all__ = ["Range", "Wanted", "cut_ranges", "expected_start", "overlap", "plan_ranges"]

_SATURATED = 0xFFFFFFFF
_WIDEST_GAP_BYTES = 64 << 10  # to read over it costs less than another request


@dataclass(slots=True, kw_only=True)
class Wanted:
    """A record, and the memory for its bytes.

    Attributes:
        entry: of the record.
        target: the memory.
        start: where the bytes are expected to begin.
        sums: length and CRC-32 of the pieces that have come, in order.
    """

    entry: Entry
    target: memoryview
    start: int
    sums: list[tuple[int, int]] = field(default_factory=list)

    def fits(self, nbytes: int) -> bool:
        """Return whether the memory is as long as the record, all of which lies in a file of *nbytes* bytes."""
        return self.target.nbytes == self.entry.nbytes <= nbytes - self.start

    @property
    def checksum(self) -> int:
        """The CRC-32 of what has been read; after all of its pieces were noted, in order."""
        if crc32_combine is None:
            return crc32(self.target, 0)
        value = 0
        for nbytes, piece in self.sums:
            value = crc32_combine(value, piece, nbytes)
        return value


@dataclass(slots=True, kw_only=True)
class Range:
    """One request.

    Attributes:
        start: of the range in the file.
        targets: where its bytes go, one after the other.
        nbytes: its length.
    """

    start: int
    targets: list[memoryview] = field(default_factory=list)
    nbytes: int = 0
    _pieces: list[tuple[Wanted, memoryview]] = field(default_factory=list)
    _headers: list[tuple[Wanted, memoryview]] = field(default_factory=list)

    def lead_to(self, record: Wanted) -> None:
        """Go on to where the bytes of *record* begin, over its header."""
        at = self.start + self.nbytes
        aside = memoryview(bytearray(record.start - at))
        self._headers.append((record, aside[record.entry.header - at :]))
        self._add(aside)

    def cover(self, record: Wanted, piece: memoryview) -> None:
        """Go on over *piece*, the next of *record*."""
        self._pieces.append((record, piece))
        self._add(piece)

    def note(self) -> bool:
        """Now that the bytes are there, sum them up; return whether the records are where they were expected."""
        for record, header in self._headers:
            try:
                found = data_start(record.entry.header, header[: LOCAL_HEADER.size])
            except NOT_UNDERSTOOD:
                return False
            if found != record.start:
                return False
        for record, piece in self._pieces:
            if crc32_combine is not None:
                record.sums.append((piece.nbytes, crc32(piece, 0)))
        return True

    def _add(self, target: memoryview) -> None:
        self.targets.append(target)
        self.nbytes += target.nbytes


def expected_start(entry: Entry, alignment: int) -> int:
    """Tell where torch lets the bytes of a record begin: ``getPadding`` of its inline_container.cc aligns them."""
    start = entry.header + LOCAL_HEADER.size + len(entry.name.encode()) + 4
    if max(entry.nbytes, entry.header) >= _SATURATED:
        start += 4 + 16 * (entry.nbytes >= _SATURATED) + 8 * (entry.header >= _SATURATED)
    return -(-start // alignment) * alignment


def overlap(records: Iterable[Wanted]) -> bool:
    """Return whether records overlap; torch's never do, and read so a file would take more than its length."""
    stop = 0
    for record in sorted(records, key=lambda record: record.entry.header):
        if record.entry.header < stop:
            return True
        stop = record.start + record.entry.nbytes
    return False


def cut_ranges(
    start: int, targets: Iterable[memoryview], *, longest_bytes: int
) -> list[tuple[int, list[memoryview]]]:
    """Return the ranges, each with where its bytes go, that fill *targets* one after the other from *start* on.

    Args:
        start: where they begin in the file.
        targets: where the bytes go.
        longest_bytes: the most that one request should ask for.
    """
    ranges: list[tuple[int, list[memoryview]]] = []
    room = 0
    for target in targets:
        left = target
        while left.nbytes:
            if room <= 0:
                ranges.append((start, []))
                room = longest_bytes
            piece = left[:room]
            ranges[-1][1].append(piece)
            start, room, left = start + piece.nbytes, room - piece.nbytes, left[piece.nbytes :]
    return ranges


def plan_ranges(records: Iterable[Wanted], *, longest_bytes: int) -> list[Range]:
    """Return the ranges that read *records*, in the order of the file.

    Args:
        records: what to read; none of them empty, and no two that `overlap`.
        longest_bytes: the most that one request should ask for, headers aside.

    Returns:
        The ranges, each with the pieces of one record after the other.
    """
    ranges: list[Range] = []
    for record in sorted(records, key=lambda record: record.start):
        here = ranges[-1].start + ranges[-1].nbytes if ranges else 0
        gap = record.entry.header - here
        if not ranges or not 0 <= gap <= _WIDEST_GAP_BYTES or ranges[-1].nbytes >= longest_bytes:
            ranges.append(Range(start=record.entry.header))
        ranges[-1].lead_to(record)
        left = record.target
        while left.nbytes:
            room = longest_bytes - ranges[-1].nbytes
            if room <= 0:
                ranges.append(Range(start=record.start + record.target.nbytes - left.nbytes))
                room = longest_bytes
            ranges[-1].cover(record, left[:room])
            left = left[room:]
    return ranges
