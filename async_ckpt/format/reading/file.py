"""A checkpoint as a file object, which ``torch.load`` reads on the caller's thread while it is being fetched.

Guarantees: the bytes are those of the file, and the checksum of every record that is read whole is verified. Torch's
memory is written to only during a read of torch's; otherwise it is kept alive until the last write to it has ended, so
that nobody has to wait for storage that hangs (B2). The offsets of the records come from the end of the file; a file
that is not a zip archive can be read, too.

What does not belong here: waiting for the bytes (`fetched_bytes`), the order of fetching (`readahead`), interpreting
the bytes (`reader`).
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from async_ckpt.errors import CorruptCheckpointError, ServiceClosedError
from async_ckpt.format.central_directory import LOCAL_HEADER, NOT_UNDERSTOOD, Entry, data_start
from async_ckpt.format.checksum import crc32
from async_ckpt.format.reading.direct import Wanted, cut_ranges, expected_start, overlap, plan_ranges
from async_ckpt.format.reading.fetched_bytes import FetchedBytes, Loop
from async_ckpt.format.reading.index import Index, read_index
from async_ckpt.format.reading.readahead import CHUNK_BYTES, Piece, ReadAhead
from async_ckpt.format.reading.records import Storage, reading_order
from async_ckpt.snapshot.parallel_copy import populate

__all__ = ["USUAL_ALIGNMENT", "CheckpointFile"]

_log = logging.getLogger("async_ckpt.format")

_POPULATED_BYTES = 128 << 10  # less lies in pages that are there, as a rule

# Bounds the memory beside the state. torch itself reads longer records.
_LONGEST_BEGINNING_BYTES = 16 << 20
_LONGEST_NUMBER_BYTES = 20

END_SECONDS = 1.0
"""How long a running read may take to end before it is left behind."""

USUAL_ALIGNMENT = 64
"""Of records, where torch does not say: until 2.7 it had no other."""

LONGEST_BYTES = 32 << 20
"""The length of reads that go straight into the memory of storages, if there is much to read."""


class CheckpointFile(io.RawIOBase):
    """The file object; close it on every path.

    Args:
        ahead: fetches the file.
        loop: runs the fetching.
        url: for messages.
        moved: called, on the caller's thread, with the number of bytes that have arrived.

    Attributes:
        nbytes: length of the file.
        error: the error that ended the reading; torch may hide it behind an error of its own.
        ended_early: whether more bytes were requested than the file has.
        alignment: the alignment of the records; None before `keep_beginning`, or if torch did not write the archive.
    """

    def __init__(
        self,
        ahead: ReadAhead,
        *,
        loop: Loop,
        url: str,
        moved: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.nbytes = 0
        self.error: BaseException | None = None
        self.ended_early = False
        self.alignment: int | None = None
        self._ahead = ahead
        self._loop = loop
        self._url = url
        self._moved = moved
        self._position = 0
        self._started = False
        self._running = False
        self._end_by: float | None = None
        self._bytes = FetchedBytes(ahead, loop)
        self._index = Index()
        self._records: dict[int, Entry] = {}  # by where their bytes begin, once their header was read
        self._skipped: Collection[str] = ()
        self._last: str | None = None

    # -- for the reader

    def start(self) -> None:
        """Open the file, and read its directory.

        Raises:
            FileNotFoundError: the file does not exist.
            StoreError: it cannot be read.
        """
        with self._failing():
            self._running = True
            self._started = True
            self._loop.spawn(self._ahead.run)
            self.nbytes = self._ahead.opened.result()
            self._bytes.kept_from = self.nbytes
            self._index = read_index(self._bytes.fetch, self.nbytes)
            self._bytes.keep_end(self._index.kept_from, self._index.tail)

    @property
    def has_directory(self) -> bool:
        """Whether the file ends like a zip archive."""
        return self._index.has_directory

    @property
    def storages(self) -> dict[str, Storage] | None:
        """The records of storages by name, in the probable order of reading; see `Index`."""
        return self._index.storages

    @property
    def entries(self) -> dict[str, Entry]:
        """What the directory says of the records, by their whole names."""
        return {entry.name: entry for entry in self._index.headers.values()}

    def fetch_all_but(self, skipped: Collection[str] = ()) -> None:
        """Fetch what will be read from now on; the memory of *skipped* storages stays unfilled."""
        with self._failing():
            self._skipped = skipped
            self._records.clear()
            self._bytes.forget_last()
            script = reading_order(
                self.nbytes,
                self.storages,
                skipped=skipped,
            )
            self._loop.call(
                self._ahead.follow,
                [
                    (max(start, self._bytes.kept_to), min(stop, self._bytes.kept_from))
                    for start, stop in script
                ],
            )

    def keep_beginning(self) -> None:
        """Fetch and keep the bytes before the first storage, mainly the pickle, if they are not too long."""
        assert self.storages is not None
        with self._failing():
            stop = min((place.start for place in self.storages.values()), default=0)
            if not 0 < stop <= min(self._bytes.kept_from, _LONGEST_BEGINNING_BYTES):
                return
            self._bytes.keep_beginning(stop)
        alignment = USUAL_ALIGNMENT
        with suppress(ValueError):
            said = self.record(".storage_alignment", longest_bytes=_LONGEST_NUMBER_BYTES)
            alignment = max(1, int(said or USUAL_ALIGNMENT))
        pickled = self._index.entry("data.pkl")
        if pickled is not None and self._start_of(pickled) == expected_start(pickled, alignment):
            self.alignment = alignment

    def record(self, name: str, *, longest_bytes: int = _LONGEST_BEGINNING_BYTES) -> bytes | None:
        """Return the content of the record *name*, which is given without the archive's name.

        None if there is no such record, or it is longer.
        """
        entry = self._index.entry(name)
        start = None if entry is None or entry.nbytes > longest_bytes else self._start_of(entry)
        if entry is None or start is None:
            return None
        self.seek(start)
        return self.read(entry.nbytes)

    def read_storages(self, targets: Mapping[str, memoryview]) -> bool:
        """Read storages straight into memory, in large concurrent ranges.

        Args:
            targets: the memory of each storage: a view that keeps it alive, as a read that hangs may write to it after
                this has raised.

        Returns:
            False if the archive has another layout than torch writes, or a record and its memory differ in length; the
            content of the memory is undefined then.

        Raises:
            CorruptCheckpointError: a storage's checksum does not match.
            StoreError: it cannot be read.
        """
        with self._failing():
            entries = {entry.name: entry for entry in self._index.headers.values()}
            wanted = [
                Wanted(
                    entry=entry, target=target, start=expected_start(entry, self.alignment or USUAL_ALIGNMENT)
                )
                for entry, target in ((entries[name], target) for name, target in targets.items())
            ]
            # The lengths of the memory come from the pickle, which older versions of torch trust.
            if not all(each.fits(self.nbytes) for each in wanted) or overlap(wanted):
                return False
            ranges = plan_ranges(wanted, longest_bytes=self._longest_bytes(targets.values()))
            pieces = self._gather([(each.start, each.targets) for each in ranges], targets.values())
            as_expected = True
            for piece, each in zip(pieces, ranges, strict=True):
                piece.arrived.result()
                self._moved(each.nbytes)
                as_expected = as_expected and each.note()
            if as_expected:
                for record in wanted:
                    self._compare(record.entry, record.checksum)
            return as_expected

    def read_into(self, start: int, targets: Sequence[memoryview]) -> None:
        """Read straight into memory, one target after the other, from offset *start* on, in concurrent reads.

        Args:
            start: the offset; the whole range lies within the file.
            targets: views that keep their memory alive, as a read that hangs may write to it after this has raised.

        Raises:
            StoreError: it cannot be read.
        """
        with self._failing():
            ranges = cut_ranges(start, targets, longest_bytes=self._longest_bytes(targets))
            for piece, (_, cut) in zip(self._gather(ranges, targets), ranges, strict=True):
                piece.arrived.result()
                self._moved(sum(each.nbytes for each in cut))

    def _longest_bytes(self, targets: Iterable[memoryview]) -> int:
        """Return the size of a request with which all readers have something to do."""
        share = sum(target.nbytes for target in targets) // (2 * self._ahead.readers)
        return min(max(share, CHUNK_BYTES), LONGEST_BYTES)

    def _gather(
        self, ranges: Sequence[tuple[int, Sequence[memoryview]]], memory: Iterable[memoryview]
    ) -> list[Piece]:
        """Read ranges into parts of *memory*."""
        pieces = self._loop.call(self._ahead.gather, ranges)
        for target in memory:  # else the loop thread would, page by page, as the bytes come
            if target.nbytes >= _POPULATED_BYTES:
                populate(ctypes.addressof(ctypes.c_char.from_buffer(target)), target.nbytes)
        return pieces

    def take_last(self) -> str | None:
        """Return the name of the storage that was read since the last call."""
        last, self._last = self._last, None
        return last

    def stop(self, reason: BaseException) -> None:
        """Stop fetching, from any thread; the next read raises *reason*, and so does one that waits."""
        if self._end_by is None:
            self._end_by = monotonic() + END_SECONDS
        with suppress(ServiceClosedError):  # the loop has ended
            # This may run before `start`, which another thread may be about to call: check in the order of `start`.
            if (not self._started or self._running) and not self._loop.call(self._ahead.stop, reason):
                self._running = False  # it has not begun

    def end(self, reason: BaseException) -> bool:
        """Like ``stop``, but wait shortly until no read is running; return whether that is so."""
        self.stop(reason)
        if self._running and self._end_by is not None:
            try:
                self._ahead.ended.exception(self._end_by - monotonic())
            except TimeoutError:
                _log.info("a read of %s does not end and is left behind", self._url)
                return False
            self._running = False
        return True

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call *callback* once no read is running any more: at once, or on the loop thread."""
        if self._running:
            self._ahead.ended.add_done_callback(callback)
        else:
            callback()

    def close(self) -> None:
        """End the fetching."""
        if not self.closed:
            self.end(ServiceClosedError("the file has been closed"))
            self._bytes.clear()
        super().close()

    # -- for torch

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self.nbytes
        self._position = max(0, offset)
        return self._position

    def read(self, nbytes: int = -1, /) -> bytes:
        """Return up to *nbytes* bytes; raise the error that ended the reading, if any."""
        if self.error is not None:
            raise self.error
        left = max(0, self.nbytes - self._position)
        data = bytearray(left if nbytes is None or nbytes < 0 else min(nbytes, left))
        self._read_into(memoryview(data), is_kept=True)
        if self.error is not None:
            raise self.error
        self.ended_early = self.ended_early or (nbytes or 0) > left
        return bytes(data)

    def readinto(self, target: Any, /) -> int:
        """Fill *target* as far as the file goes, or return 0 and let `read` raise the error.

        Torch calls `read` when this returns 0, and while an exception is pending when this raises.
        """
        # torch's own view does not keep its memory alive.
        return self._read_into(memoryview(target).cast("B"), is_kept=False)

    # -- the reading

    def _read_into(self, view: memoryview, *, is_kept: bool) -> int:
        start = self._position
        count = min(view.nbytes, self.nbytes - start)
        if self.error is not None:
            return 0
        if count <= 0:
            self.ended_early = self.ended_early or view.nbytes > 0
            return 0
        try:
            self._fill(start, view[:count], is_kept)
        except BaseException as error:
            self._give_up(error)
            return 0
        self._position = start + count
        return count

    def _fill(self, start: int, view: memoryview, is_kept: bool) -> None:
        record = self._records.get(start)
        if record is not None and record.nbytes == view.nbytes:
            if record.name in self._skipped:
                self._last = record.name
                return
            checksum = 0
            for begin, end in self._bytes.arrivals(start, view, is_kept):
                self._moved(end - begin)
                checksum = crc32(view[begin:end], checksum)
            self._compare(record, checksum)
            if self.storages is not None and record.name in self.storages:
                self._last = record.name
            return
        header = self._index.headers.get(start) if view.nbytes == LOCAL_HEADER.size else None
        if header is not None and header.name in self._skipped:
            # A stand-in, whose offset is that of a record without padding and extra fields.
            LOCAL_HEADER.pack_into(view, 0, b"PK\x03\x04", *[0] * 8, len(header.name.encode()), 0)
        else:
            for begin, end in self._bytes.arrivals(start, view, is_kept):
                self._moved(end - begin)
        if header is not None:
            with suppress(*NOT_UNDERSTOOD):
                self._records[data_start(start, view)] = header

    def _start_of(self, entry: Entry) -> int | None:
        """Return the offset of a record's bytes, if its local header is valid."""
        self.seek(entry.header)
        with suppress(*NOT_UNDERSTOOD):
            return data_start(entry.header, self.read(LOCAL_HEADER.size))
        return None

    def _compare(self, record: Entry, checksum: int) -> None:
        if record.checksum not in (checksum, 0):  # torch writes 0 where its user wants no checksums
            raise CorruptCheckpointError(
                f"{self._url!r} is corrupt: its record {record.name!r} has the checksum {checksum:#010x} "
                f"instead of {record.checksum:#010x}. Load an earlier checkpoint.",
                location=self._url,
                stage="read",
            )

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Stop fetching if the body raises."""
        try:
            yield
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        self.error = error
        try:
            self.end(error)
        except BaseException as interruption:
            self.error = interruption
