"""A checkpoint file whose storages' bytes come from elsewhere: everything around them, with the right checksums.

Guarantees: together with the bytes of the storages, it is the file that ``torch.save`` would write. Threads may share a
frame: they write the same checksums.

What does not belong here: where the bytes of the storages come from.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from async_ckpt.format.checksum import crc32
from async_ckpt.format.writing.archive import find_records
from async_ckpt.format.writing.fingerprint import DIGITS, digits, find_fingerprint
from async_ckpt.format.writing.recorder import Reference
from async_ckpt.format.writing.torch_writer import write_records
from async_ckpt.snapshot import Storages
from async_ckpt.snapshot.torch_format import Record, alignment

__all__ = ["Frame"]


class Frame:
    """The file that torch's writer makes of records, some of which are storages without bytes.

    Args:
        records: the records of the archive; a number stands for a storage.
        sizes: the sizes of the storages in bytes.

    Attributes:
        nbytes: the length of the file.
        storages: the numbers of the storages, in the order of the file.
        starts: the offsets of their bytes in the file, in that order.
        stops: the ends of their bytes.
    """

    def __init__(self, records: Sequence[Record], sizes: Sequence[int]) -> None:
        self._segments = write_records(_Blank(sizes), records)
        self._begins: list[int] = []
        self.nbytes = 0
        for segment in self._segments:
            self._begins.append(self.nbytes)
            self.nbytes += len(segment)
        self._records, self._tail = find_records(self.nbytes, self._read)
        self._fingerprint = find_fingerprint(self._records, self._read)
        if self._fingerprint is not None:
            self._tail = self._records.starts[self._fingerprint]
        by_name = {name.partition("/")[2]: number for number, name in enumerate(self._records.names)}
        held = sorted((by_name[name], number) for name, number in records if isinstance(number, int))
        self.storages = [number for _, number in held]
        self.starts = [self._records.starts[record] for record, _ in held]
        self.stops = [self._records.stops[record] for record, _ in held]
        self._storage_of = dict(held)
        self._checksums: dict[int, int] = {}  # of the other records

    def fill(self, start: int, stop: int, memory: memoryview, checksum: Callable[[int], int]) -> None:
        """Put the bytes *start* to *stop* into *memory*, except for the bytes of storages.

        Args:
            start: the first byte.
            stop: the end, exclusive.
            memory: as long as the range.
            checksum: returns the CRC-32 of a storage, given its number; called for those that the range depends on.
        """
        self._seal(start, stop, checksum)
        at, hole = start, max(0, bisect_right(self.starts, start) - 1)
        while at < stop:
            while hole < len(self.starts) and self.stops[hole] <= at:
                hole += 1
            if hole < len(self.starts) and self.starts[hole] <= at:
                at = min(stop, self.stops[hole])
                continue
            end = min(stop, self.starts[hole] if hole < len(self.starts) else stop)
            memory[at - start : end - start] = self._read(at, end - at)
            at = end

    def _seal(self, start: int, stop: int, checksum: Callable[[int], int]) -> None:
        """Write the checksums that lie, at least partly, in a range."""
        records, last = self._records, self._fingerprint

        def checksum_of(record: int) -> int:
            storage = self._storage_of.get(record)
            return self._own_checksum(record) if storage is None else checksum(storage)

        offsets = records.checksum_offsets
        for record in range(bisect_left(offsets, start - 3), bisect_left(offsets, stop)):
            if record != last:
                self._write(offsets[record], checksum_of(record).to_bytes(4, "little"))
        if stop <= self._tail:
            return
        if last is not None:
            self._write(records.starts[last] + DIGITS, digits(records, last, checksum_of))
            self._write(offsets[last], checksum_of(last).to_bytes(4, "little"))
        for record, central in enumerate(records.central_offsets):
            self._write(central, checksum_of(record).to_bytes(4, "little"))

    def _own_checksum(self, record: int) -> int:
        value = self._checksums.get(record)
        if value is None:
            start, stop = self._records.starts[record], self._records.stops[record]
            value = self._checksums[record] = crc32(self._read(start, stop - start), 0)
        return value

    def _write(self, where: int, value: bytes) -> None:
        index = bisect_right(self._begins, where) - 1
        segment = self._segments[index]
        assert isinstance(segment, bytearray), "checksums are in headers"
        at = where - self._begins[index]
        segment[at : at + len(value)] = value

    def _read(self, start: int, nbytes: int) -> bytes:
        if start < 0:
            return b""
        found, index = [], bisect_right(self._begins, start) - 1
        stop = min(start + nbytes, self.nbytes)
        while start < stop:
            segment, at = self._segments[index], start - self._begins[index]
            count = min(stop - start, len(segment) - at)
            if isinstance(segment, Reference):
                found.append(bytes(count))
            else:
                found.append(bytes(segment[at : at + count]))
            start += count
            index += 1
        return b"".join(found)


class _Blank:
    """Storages with no memory."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.storages = Storages(sizes, ["cpu"] * len(sizes), [0] * len(sizes))
        self.alignment = alignment()

    def view(self, index: int) -> memoryview:
        """Return zeros."""
        return memoryview(bytes(self.storages[index].nbytes))
