"""Plans reads straight into the memory of torch's storages, in large ranges over many records. Pure.

Guarantees: a range covers its records and the bytes between them, which are read into separate memory. They contain the
local headers, by which the expected offsets of the records are verified.

What does not belong here: making the requests (`readahead`), waiting for them (`file`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from async_ckpt.format.central_directory import LOCAL_HEADER, NOT_UNDERSTOOD, Entry, data_start
from async_ckpt.format.checksum import crc32, crc32_combine

__all__ = ["Range", "Wanted", "cut_ranges", "expected_start", "overlap", "plan_ranges"]

_SATURATED = 0xFFFFFFFF
_WIDEST_GAP_BYTES = 64 << 10  # reading these bytes, too, costs less than another request


@dataclass(slots=True, kw_only=True)
class Wanted:
    """A record and the memory to read it into.

    Attributes:
        entry: the record's entry.
        target: the memory.
        start: the expected offset of its bytes.
        sums: length and CRC-32 of the pieces that have arrived, in order.
    """

    entry: Entry
    target: memoryview
    start: int
    sums: list[tuple[int, int]] = field(default_factory=list)

    def fits(self, nbytes: int) -> bool:
        """Return whether memory and record have one length, and the record lies within a file of *nbytes* bytes."""
        return self.target.nbytes == self.entry.nbytes <= nbytes - self.start

    @property
    def checksum(self) -> int:
        """The CRC-32 of the bytes read; valid once all pieces were noted, in order."""
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
        start: the range's offset in the file.
        targets: the memory for its bytes, in order.
        nbytes: its length.
    """

    start: int
    targets: list[memoryview] = field(default_factory=list)
    nbytes: int = 0
    _pieces: list[tuple[Wanted, memoryview]] = field(default_factory=list)
    _headers: list[tuple[Wanted, memoryview]] = field(default_factory=list)

    def lead_to(self, record: Wanted) -> None:
        """Extend the range over the header of *record*, up to its bytes."""
        at = self.start + self.nbytes
        aside = memoryview(bytearray(record.start - at))
        self._headers.append((record, aside[record.entry.header - at :]))
        self._add(aside)

    def cover(self, record: Wanted, piece: memoryview) -> None:
        """Extend the range over *piece*, the next of *record*."""
        self._pieces.append((record, piece))
        self._add(piece)

    def note(self) -> bool:
        """Compute the checksums of the bytes that were read; return whether the records are at the expected offsets."""
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
    """Return the offset at which torch aligns a record's bytes; see ``getPadding`` in its inline_container.cc."""
    start = entry.header + LOCAL_HEADER.size + len(entry.name.encode()) + 4
    if max(entry.nbytes, entry.header) >= _SATURATED:
        start += 4 + 16 * (entry.nbytes >= _SATURATED) + 8 * (entry.header >= _SATURATED)
    return -(-start // alignment) * alignment


def overlap(records: Iterable[Wanted]) -> bool:
    """Return whether records overlap; torch's never do, and they would take more memory than the file's length."""
    stop = 0
    for record in sorted(records, key=lambda record: record.entry.header):
        if record.entry.header < stop:
            return True
        stop = record.start + record.entry.nbytes
    return False


def cut_ranges(
    start: int, targets: Iterable[memoryview], *, longest_bytes: int
) -> list[tuple[int, list[memoryview]]]:
    """Return ranges, with their memory, that fill *targets* one after the other from offset *start* on.

    Args:
        start: the offset in the file.
        targets: the memory for the bytes.
        longest_bytes: the largest request.
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
        records: the records; not empty, and without `overlap`.
        longest_bytes: the largest request, headers aside.

    Returns:
        The ranges, each with the pieces of its records.
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
