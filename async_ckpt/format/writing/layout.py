"""The layout: the exact bytes of a checkpoint file, as a scatter list, before anything is written.

Guarantees: the bytes equal those of ``torch.save``, checksums included, in whatever pieces, order and threads they are
read. Storages are read from the snapshot only when needed, and no view of them is kept.

torch's own writer makes the bytes; only the checksums are ours. They are computed off the training thread, when a part
that contains them is read.

What does not belong here: the structure of zip archives (`archive`), writing the bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from struct import Struct

from async_ckpt.format.checksum import crc32, crc32_combine
from async_ckpt.format.writing.archive import find_records
from async_ckpt.format.writing.fingerprint import DIGITS, digits, find_fingerprint
from async_ckpt.format.writing.kept import Kept, Shape, keep
from async_ckpt.format.writing.overlap import Piece
from async_ckpt.format.writing.recorder import Reference, Segment
from async_ckpt.format.writing.torch_writer import write, write_records
from async_ckpt.snapshot import Snapshot
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Layout", "lay_out"]

_UINT32 = Struct("<I")


@collector_held_back()
def lay_out(snapshot: Snapshot, kept: Kept | None = None) -> Layout:
    """Lay out the file of *snapshot*. Blocks for about 15 µs per tensor: call it in a worker.

    Args:
        snapshot: must stay open while the layout is read.
        kept: the layout of a file before, ``Layout.kept``; where it serves this one, it takes less than a microsecond.

    Returns:
        The file.

    Raises:
        AsyncCheckpointError: torch writes archives in an unknown format.
    """
    segments = None if kept is None else kept.segments(snapshot)
    if kept is not None and segments is not None:
        return Layout(snapshot, segments, shape=kept.shape, kept=kept)
    filled, content = snapshot.filled(), snapshot.unfilled
    if filled is None or content is None:
        return Layout(snapshot, write(snapshot))
    records = snapshot.records(filled)
    layout = Layout(snapshot, write_records(snapshot, records))
    layout.kept = keep(content, filled, records, layout.segments, layout.shape)
    return layout


class Layout:
    """A file by reference; satisfies ``stores.base.Content``. Made by `lay_out`.

    Args:
        snapshot: holds the bytes of the storages.
        segments: the output of torch's writer.
        shape: of the file, if it is known.
        kept: from what it was made.

    Attributes:
        kept: what the next file may be laid out by.
        shape: of the file.
        segments: as above.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        segments: Sequence[Segment],
        *,
        shape: Shape | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.kept = kept
        self.segments = segments
        self._snapshot = snapshot
        *starts, nbytes = accumulate(map(len, segments), initial=0)
        self._starts: Sequence[int] = starts if shape is None else shape.starts
        self.shape = self._shape_of(nbytes) if shape is None else shape
        self._nbytes, self._records = self.shape.nbytes, self.shape.records
        self._tail, self._fingerprint = self.shape.tail, self.shape.fingerprint
        self._checksums: dict[int, int] = {}  # by the record's place in the archive
        self._sums: dict[int, tuple[int, int]] = {}  # of pieces of records, by their beginning: end, CRC-32

    def _shape_of(self, nbytes: int) -> Shape:
        records, tail = find_records(nbytes, self._read_header)
        fingerprint = find_fingerprint(records, self._read_header)
        return Shape(
            nbytes=nbytes,
            starts=self._starts,
            records=records,
            tail=tail if fingerprint is None else records.starts[fingerprint],
            fingerprint=fingerprint,
        )

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self._nbytes

    def read(self, start: int, stop: int) -> list[memoryview]:
        """Return the bytes *start* to *stop*; computes the checksums among them, so call it in a worker.

        Args:
            start: the first byte.
            stop: the end, exclusive.

        Returns:
            Read-only views, to be dropped before the snapshot is closed.

        Raises:
            ValueError: the range is not within the file, or the snapshot is closed.
        """
        if not 0 <= start <= stop <= self._nbytes:
            raise ValueError(f"no bytes {start} to {stop} in a file of {self._nbytes}")
        self._seal(start, stop)
        return self._views(start, stop)

    def steps(self, start: int, stop: int, step_bytes: int) -> Iterator[list[memoryview]]:
        """Yield the bytes *start* to *stop* in order, in steps, each read when it is asked for. Use it in a worker.

        The bytes of a step have just been summed up, so they are in the CPU's cache. None are summed up twice.
        """
        for begin in range(start, stop, step_bytes):
            end = min(begin + step_bytes, stop)
            self._sum_cut_records(begin, end)
            yield self.read(begin, end)

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of the bytes *start* to *stop*, as `read` returns them.

        The result is reused for the checksum of the record.
        """
        pieces = list(self._pieces(start, stop)) if crc32_combine is not None else []
        for begin, end in pieces:
            self._sum(begin, end)
        self._seal(start, stop)
        value, at = 0, start
        for begin, end in pieces:
            value = self._crc32(at, begin, value)
            assert crc32_combine is not None
            value, at = crc32_combine(value, self._sum(begin, end), end - begin), end
        return self._crc32(at, stop, value)

    def pieces(self) -> list[Piece]:
        """Return the pieces of the file, checksums in place: call it in a worker.

        This works even after the snapshot was closed, if every byte was read before.
        """
        self._seal(0, self._nbytes)
        return [self._piece(segment) for segment in self.segments]

    def _piece(self, segment: Segment) -> Piece:
        if not isinstance(segment, Reference):
            return segment
        return self._snapshot.storages[segment.storage].start + segment.start, len(segment)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the range that lie in records with bytes that do not depend on checksums."""
        records = self._records
        for record in range(max(0, bisect_right(records.starts, start) - 1), len(records.starts)):
            if records.starts[record] >= stop:
                return
            begin, end = max(start, records.starts[record]), min(stop, records.stops[record])
            if begin < end and record != self._fingerprint:
                yield begin, end

    def _sum_cut_records(self, start: int, stop: int) -> None:
        """Note the sums of the records of which only a piece is in the range; `_seal` sums up the others."""
        records = self._records
        first, last = bisect_right(records.starts, start) - 1, bisect_left(records.starts, stop) - 1
        for record in {first, last} if crc32_combine is not None else ():
            if record < 0 or record in self._checksums or record == self._fingerprint:
                continue
            begin, end = max(start, records.starts[record]), min(stop, records.stops[record])
            if begin < end and end - begin < records.stops[record] - records.starts[record]:
                self._sum(begin, end)

    def _sum(self, start: int, stop: int) -> int:
        """Return the CRC-32 of a piece of a record."""
        end, value = self._sums.get(start, (0, 0))
        if end != stop:
            value = self._crc32(start, stop)
            self._sums[start] = stop, value
        return value

    def _crc32(self, start: int, stop: int, value: int = 0) -> int:
        for view in self._views(start, stop):
            value = crc32(view, value)
        return value

    def _views(self, start: int, stop: int) -> list[memoryview]:
        views = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            segment, begin = self.segments[index], self._starts[index]
            end = min(stop, begin + len(segment))
            views.append(self._slice(segment, start - begin, end - begin))
            start = end
            index += 1
        return views

    def _slice(self, segment: Segment, start: int, stop: int) -> memoryview:
        if isinstance(segment, Reference):
            return self._snapshot.view(segment.storage)[segment.start + start : segment.start + stop]
        return memoryview(segment).toreadonly()[start:stop]

    def _read_header(self, start: int, nbytes: int) -> bytes:
        index = bisect_right(self._starts, start) - 1
        segment, at = self.segments[index], start - self._starts[index]
        if isinstance(segment, bytearray) and at + nbytes <= len(segment):  # views are too slow for thousands
            return bytes(segment[at : at + nbytes])
        return b"".join(self._views(start, start + nbytes)) if start >= 0 else b""

    def _seal(self, start: int, stop: int) -> None:
        """Write the checksums that lie, at least partly, in a range.

        Several threads may do this at once: they write the same values.
        """
        offsets = self._records.checksum_offsets
        record, end = bisect_left(offsets, start - 3), bisect_left(offsets, stop)
        while record < end:
            record = self._seal_small(record, end)
            if record < end and record != self._fingerprint:
                self._patch(offsets[record], self._checksum(record))
            record += 1
        if stop > self._tail:
            self._seal_tail()

    def _seal_small(self, record: int, end: int) -> int:
        """Seal the records from *record* on that are in its segment as a whole, checksum included; return the next."""
        starts, stops, offsets = self._records.starts, self._records.stops, self._records.checksum_offsets
        index = bisect_right(self._starts, starts[record]) - 1
        segment, begin = self.segments[index], self._starts[index]
        if not isinstance(segment, bytearray):
            return record
        last = min(end, bisect_right(offsets, begin + len(segment) - 4))
        if self._fingerprint is not None:
            last = min(last, self._fingerprint)
        view = memoryview(segment)
        while record < last and begin <= min(starts[record], offsets[record]):
            checksum = self._checksums.get(record)
            if checksum is None:
                piece = view[starts[record] - begin : stops[record] - begin]
                checksum = self._checksum(record) if self._sums else crc32(piece, 0)
                self._checksums[record] = checksum
            _UINT32.pack_into(segment, offsets[record] - begin, checksum)
            record += 1
        return record

    def _seal_tail(self) -> None:
        if self._fingerprint is not None:
            half = digits(self._records, self._fingerprint, self._checksum)
            self._overwrite(self._records.starts[self._fingerprint] + DIGITS, half)
            self._patch(self._records.checksum_offsets[self._fingerprint], self._checksum(self._fingerprint))
        begin, last = self._starts[-1], self.segments[-1]
        for record, central in enumerate(self._records.central_offsets):
            if central >= begin and isinstance(last, bytearray):
                _UINT32.pack_into(last, central - begin, self._checksum(record))
            else:
                self._patch(central, self._checksum(record))

    def _checksum(self, record: int) -> int:
        checksum = self._checksums.get(record)
        if checksum is None:
            checksum, at, stop = 0, self._records.starts[record], self._records.stops[record]
            while at < stop and at in self._sums and crc32_combine is not None:
                end, piece = self._sums[at]
                checksum, at = crc32_combine(checksum, piece, end - at), end
            checksum = self._checksums[record] = self._crc32(at, stop, checksum)
        return checksum

    def _patch(self, where: int, checksum: int) -> None:
        self._overwrite(where, checksum.to_bytes(4, "little"))

    def _overwrite(self, where: int, value: bytes) -> None:
        index = bisect_right(self._starts, where) - 1
        gap = self.segments[index]
        assert isinstance(gap, bytearray), "checksums are in local headers"
        at = where - self._starts[index]
        gap[at : at + len(value)] = value
