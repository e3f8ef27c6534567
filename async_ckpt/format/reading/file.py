"""A checkpoint that is being fetched, as the file that ``torch.load`` reads on the caller's thread.

Guarantees: every byte is that of the file, and every record that is read whole has the checksum which the file
gives for it. Torch's memory is written to only while a read of torch's lasts, or else it is kept alive until what still
writes to it has ended, so that nobody has to wait for storage that hangs (B2). Where the records are is learned from
the end of the file; a file that is no such archive is read all the same.

What does not belong here: what is fetched when (`readahead`), what is made of the bytes (`reader`).
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, ParamSpec, Protocol, TypeVar

from async_ckpt.errors import CorruptCheckpointError, ServiceClosedError
from async_ckpt.format.checksum import crc32
from async_ckpt.format.directory import LOCAL_HEADER, NOT_UNDERSTOOD, Entry, data_start
from async_ckpt.format.reading.direct import Wanted, cut_ranges, expected_start, overlap, plan_ranges
from async_ckpt.format.reading.index import Index, read_index
from async_ckpt.format.reading.readahead import CHUNK_BYTES, Piece, ReadAhead
from async_ckpt.format.reading.records import Storage, reading_order
from async_ckpt.snapshot.parallel_copy import populate

__all__ = ["CheckpointFile", "Loop"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("async_ckpt.format")

_MANY_BYTES = 256 << 10
_ALIGNMENT = 64  # of records, where torch does not say: until 2.7 it had no other
_POPULATED_BYTES = 128 << 10  # less lies in pages that are there, as a rule

# What is kept in memory beside the state is bounded, whatever a file says of itself. What is longer, torch reads alone.
_LONGEST_BEGINNING_BYTES = 16 << 20
_LONGEST_NUMBER_BYTES = 20

END_SECONDS = 1.0
"""How long what is under way may take to end before it is left behind, to end when it can."""

LONGEST_BYTES = 32 << 20
"""Length of the reads that go straight into the memory of storages, where there is much to read."""


class Loop(Protocol):
    """The thread on which everything awaits; see ``runtime.Runtime``."""

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Have *function* called there and wait for what it returns or raises; calls keep their order."""

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the coroutine *function* there, after what was called before; return at once."""


class CheckpointFile(io.RawIOBase):
    """The file; close it on every path.

    Args:
        ahead: what fetches it.
        loop: where that runs.
        url: for messages.
        moved: told, on the caller's thread, how many bytes have come.

    Attributes:
        nbytes: length of the file.
        error: what ended the reading; torch may hide it behind an error of its own.
        ended_early: more was asked for than there is.
        alignment: of the records; None before `keep_beginning`, and where it was not torch that laid out the archive.
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
        self._near: list[tuple[int, int, memoryview]] = []  # what was fetched last; changes with every fetch
        self._kept: list[tuple[int, int, memoryview]] = []
        self._kept_to = 0  # of the beginning
        self._kept_from = 0  # of the end
        self._index = Index()
        self._records: dict[int, Entry] = {}  # by where their bytes begin, once their header was read
        self._skipped: Collection[str] = ()
        self._last: str | None = None

    # -- for the reader

    def start(self) -> None:
        """Open the file and learn what is where.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read.
        """
        with self._failing():
            self._running = True
            self._started = True
            self._loop.spawn(self._ahead.run)
            self.nbytes = self._ahead.opened.result()
            self._kept_from = self.nbytes
            self._index = read_index(self._fetch, self.nbytes)
            self._kept_from = self._index.kept_from
            self._kept = [(self._kept_from, self.nbytes, self._index.tail)]

    @property
    def has_directory(self) -> bool:
        """Whether it ends as an archive does."""
        return self._index.has_directory

    @property
    def storages(self) -> dict[str, Storage] | None:
        """The records of storages by name, in the order in which they are probably read; see `Index`."""
        return self._index.storages

    def fetch_all_but(self, skipped: Collection[str] = ()) -> None:
        """Fetch from now on what will be read, and leave the memory for these storages as it is."""
        with self._failing():
            self._skipped = skipped
            self._records.clear()
            self._near = []
            script = reading_order(
                self.nbytes,
                self.storages,
                skipped=skipped,
            )
            self._loop.call(
                self._ahead.follow,
                [(max(start, self._kept_to), min(stop, self._kept_from)) for start, stop in script],
            )

    def keep_beginning(self) -> None:
        """Fetch once and keep what stands before the first storage, if it is not too long: the pickle, above all."""
        assert self.storages is not None
        with self._failing():
            stop = min((place.start for place in self.storages.values()), default=0)
            if not 0 < stop <= min(self._kept_from, _LONGEST_BEGINNING_BYTES):
                return
            self._kept.append((0, stop, self._fetch(0, stop)))
            self._kept_to = stop
        alignment = _ALIGNMENT
        with suppress(ValueError):
            said = self.record(".storage_alignment", longest_bytes=_LONGEST_NUMBER_BYTES)
            alignment = max(1, int(said or _ALIGNMENT))
        pickled = self._index.entry("data.pkl")
        if pickled is not None and self._start_of(pickled) == expected_start(pickled, alignment):
            self.alignment = alignment

    def record(self, name: str, *, longest_bytes: int = _LONGEST_BEGINNING_BYTES) -> bytes | None:
        """Return what is in the record of that name, less the archive's own name before it.

        None where there is no such record, or a longer one.
        """
        entry = self._index.entry(name)
        start = None if entry is None or entry.nbytes > longest_bytes else self._start_of(entry)
        if entry is None or start is None:
            return None
        self.seek(start)
        return self.read(entry.nbytes)

    def read_storages(self, targets: Mapping[str, memoryview]) -> bool:
        """Read storages straight into memory, in large ranges, several at a time.

        Args:
            targets: for each storage, the memory that it fills: a view that keeps it alive, for a read that hangs may
                write to it after this has raised.

        Returns:
            False where the archive is laid out otherwise than torch does it, or has more or fewer bytes than there
            is memory for: then nothing is known of the memory.

        Raises:
            CorruptCheckpointError: a storage has not the checksum that the file gives for it.
            StoreError: it cannot be read.
        """
        with self._failing():
            entries = {entry.name: entry for entry in self._index.headers.values()}
            wanted = [
                Wanted(entry=entry, target=target, start=expected_start(entry, self.alignment or _ALIGNMENT))
                for entry, target in ((entries[name], target) for name, target in targets.items())
            ]
            # The lengths of the memory are what the pickle says, and older torch believes it.
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
        """Read straight into memory, one place after the other, what stands from *start* on; several reads at a time.

        Args:
            start: where it begins; all of it lies within the file.
            targets: views that keep their memory alive, for a read that hangs may write to it after this has raised.

        Raises:
            StoreError: it cannot be read.
        """
        with self._failing():
            ranges = cut_ranges(start, targets, longest_bytes=self._longest_bytes(targets))
            for piece, (_, cut) in zip(self._gather(ranges, targets), ranges, strict=True):
                piece.arrived.result()
                self._moved(sum(each.nbytes for each in cut))

    def _longest_bytes(self, targets: Iterable[memoryview]) -> int:
        """Return how much to ask for at a time, so that all readers have something to do."""
        share = sum(target.nbytes for target in targets) // (2 * self._ahead.readers)
        return min(max(share, CHUNK_BYTES), LONGEST_BYTES)

    def _gather(
        self, ranges: Sequence[tuple[int, Sequence[memoryview]]], memory: Iterable[memoryview]
    ) -> list[Piece]:
        """Have ranges read into parts of *memory*."""
        pieces = self._loop.call(self._ahead.gather, ranges)
        for target in memory:  # else the loop thread would, page by page, as the bytes come
            if target.nbytes >= _POPULATED_BYTES:
                populate(ctypes.addressof(ctypes.c_char.from_buffer(target)), target.nbytes)
        return pieces

    def take_last(self) -> str | None:
        """Return the name of the storage that was read since this was last called."""
        last, self._last = self._last, None
        return last

    def stop(self, reason: BaseException) -> None:
        """Have the fetching end, from any thread; the next read raises *reason*, and so does one that waits."""
        if self._end_by is None:
            self._end_by = monotonic() + END_SECONDS
        with suppress(ServiceClosedError):  # the loop has ended
            # Also before `start`, which another thread may be about to call; so look in its order.
            if (not self._started or self._running) and not self._loop.call(self._ahead.stop, reason):
                self._running = False  # it has not even begun

    def end(self, reason: BaseException) -> bool:
        """Do that, and wait until nothing is under way, but not for long; return whether that is so."""
        self.stop(reason)
        if self._running and self._end_by is not None:
            try:
                self._ahead.ended.exception(self._end_by - monotonic())
            except TimeoutError:
                _log.info("a read of %s does not end, and is left behind", self._url)
                return False
            self._running = False
        return True

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call *callback* once nothing is under way any more: at once, or on the loop thread."""
        if self._running:
            self._ahead.ended.add_done_callback(callback)
        else:
            callback()

    def close(self) -> None:
        """End the fetching."""
        if not self.closed:
            self.end(ServiceClosedError("the file has been closed"))
            self._near.clear()
            self._kept.clear()
        super().close()

    # -- for torch

    def readable(self) -> bool:
        """Tell that it is."""
        return True

    def seekable(self) -> bool:
        """Tell that it is."""
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
        """Return up to *nbytes* bytes; raises what ended the reading, now or before."""
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
        """Fill *target* as far as the file goes, or return 0 and let `read` raise what went wrong.

        Torch calls `read` when this returns 0, and while an exception is pending when this raises.
        """
        return self._read_into(
            memoryview(target).cast("B"), is_kept=False
        )  # torch's view does not keep its memory

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
            for begin, end in self._arrivals(start, view, is_kept):
                self._moved(end - begin)
                checksum = crc32(view[begin:end], checksum)
            self._compare(record, checksum)
            if self.storages is not None and record.name in self.storages:
                self._last = record.name
            return
        header = self._index.headers.get(start) if view.nbytes == LOCAL_HEADER.size else None
        if header is not None and header.name in self._skipped:
            # One that says no more than where the bytes would be, if there were neither padding nor extra fields.
            LOCAL_HEADER.pack_into(view, 0, b"PK\x03\x04", *[0] * 8, len(header.name.encode()), 0)
        else:
            for begin, end in self._arrivals(start, view, is_kept):
                self._moved(end - begin)
        if header is not None:
            with suppress(*NOT_UNDERSTOOD):
                self._records[data_start(start, view)] = header

    def _start_of(self, entry: Entry) -> int | None:
        """Tell where the bytes of a record begin, if its local header is one."""
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

    def _arrivals(self, start: int, view: memoryview, is_kept: bool) -> Iterator[tuple[int, int]]:
        """Fill *view*, and yield what has come of it, piece by piece, in order.

        Only a view that *is_kept*, with what it shows, as long as somebody may write to it is given away.
        """
        stop = start + view.nbytes
        for begin, end, memory in (*self._near, *self._kept):
            if begin <= start and stop <= end:
                view[:] = memory[start - begin : stop - begin]
                yield 0, view.nbytes
                return
        cut = min(stop, self._kept_from) if start < self._kept_from else stop
        at = start
        while at < cut:
            self._near = []
            upto = cut if is_kept else min(cut, at + self._ahead.chunk_bytes)
            target = view[at - start : upto - start] if is_kept else None
            pieces = self._loop.call(self._ahead.want, at, upto - at, target)
            for piece in pieces:
                piece.arrived.result()
                end = min(piece.stop, upto)
                if piece.is_ours:
                    _copy(view[at - start : end - start], piece.memory[at - piece.start : end - piece.start])
                yield at - start, end - start
                at = end
            self._near = [(piece.start, piece.stop, piece.memory) for piece in pieces if piece.is_ours]
        if cut < stop:
            _, _, tail = self._kept[0]
            view[cut - start :] = tail[: stop - cut]
            yield cut - start, view.nbytes

    def _fetch(self, start: int, stop: int) -> memoryview:
        data = memoryview(bytearray(stop - start))
        for _ in self._arrivals(start, data, is_kept=True):
            pass
        return data

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """End the fetching when the body raises."""
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


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; many of them without holding up the loop's thread, which needs the GIL."""
    if target.nbytes < _MANY_BYTES:
        target[:] = source
        return
    byte = ctypes.c_char
    ctypes.memmove(
        ctypes.addressof(byte.from_buffer(target)), ctypes.addressof(byte.from_buffer(source)), target.nbytes
    )
