"""Fetches a file ahead of its reader: many ranges at a time, straight into the reader's memory if possible.

Guarantees:

* Large ranges are read straight into the reader's memory, several at a time, if that memory is kept alive. Meanwhile
  and in between, the next ranges are read into a window of reused buffers, so that connections do not fall idle.
* The window, the running reads and the cost of a wrong guess are bounded (B2).
* After `stop`, no reader waits, even if a read hangs and cannot be cancelled (B2). Such a read may still write to
  memory, which is kept alive for it. Once `ended` is set, no read is running, and the source is closed.

Everything here runs on the loop thread; the reader's side, on the caller's thread, is `file`.
What does not belong here: the meaning of the bytes, and the order in which they will be read (`CheckpointFile`).
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio

from async_ckpt.errors import ServiceClosedError
from async_ckpt.handle import Outcome
from async_ckpt.stores.base import Source
from async_ckpt.stores.redaction import redacted_text

__all__ = ["CHUNK_BYTES", "Piece", "ReadAhead"]

_log = logging.getLogger("async_ckpt.format")

CHUNK_BYTES = 4 << 20
"""The length of reads into the window."""

_WINDOW_BYTES = 48 << 20


class Piece:
    """One read of the bytes *start* to *stop* of the file.

    Attributes:
        targets: the memory for the bytes, in order; views that keep the memory alive.
        arrived: set once the bytes are there.
        is_ours: whether the memory is a buffer of ours, not the reader's.
    """

    __slots__ = ("arrived", "is_ours", "start", "stop", "targets")

    def __init__(self, start: int, *targets: memoryview, is_ours: bool) -> None:
        self.start = start
        self.stop = start + sum(target.nbytes for target in targets)
        self.targets = targets
        self.is_ours = is_ours
        self.arrived: Outcome[None] = Outcome()

    @property
    def memory(self) -> memoryview:
        """The first target, and usually the only one."""
        return self.targets[0]


class ReadAhead:
    """The fetching of one file.

    Args:
        open_source: opens the file.
        max_concurrent_reads: how many reads run at a time, if the source allows it.
        longest_read_bytes: the longest read; if latency is high, a few long reads are better than many short ones.
        chunk_bytes: the length of reads into the window.

    Attributes:
        chunk_bytes: as given.
        opened: has the length of the file as its result, once it is open.
        readers: how many reads run at a time.
        ended: set when no read is running, and none will start.
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[Source]],
        *,
        max_concurrent_reads: int,
        longest_read_bytes: int = 4 * CHUNK_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.opened: Outcome[int] = Outcome()
        self.ended: Outcome[None] = Outcome()
        self._open_source = open_source
        self.readers = max_concurrent_reads
        self._longest_read_bytes = longest_read_bytes
        self.chunk_bytes = chunk_bytes
        self._begun = False
        self._reason: BaseException | None = None
        self._scope: anyio.CancelScope | None = None
        self._wake: anyio.Event | None = None
        self._urgent: deque[Piece] = deque()  # asked for, not begun
        self._patient: deque[Piece] = deque()  # the same, but nothing waits for it yet
        self._under_way: set[Piece] = set()
        self._window: deque[Piece] = deque()  # side by side in the order of the script
        self._spare: list[bytearray] = []
        self._buffers = 0
        self._limit = 0  # pieces in the window
        self._script: Sequence[tuple[int, int]] = ()
        self._by_start: list[tuple[int, int]] = []
        self._cursor = (0, 0)  # the range of the script, and the place in it, that the window has come to
        self._read_to = 0  # where the last read ended that was not in the window

    async def run(self) -> None:
        """Open the file, and fetch until `stop` is called."""
        self._begun = True
        source: Source | None = None
        try:
            with anyio.CancelScope() as self._scope:
                if self._reason is None:
                    self._wake = anyio.Event()
                    source = await self._open_source()
                    self.readers = min(self.readers, source.max_concurrent_reads or self.readers)
                    if not self.opened.done():
                        self.opened.set_result(source.nbytes)
                    async with anyio.create_task_group() as tasks:
                        for _ in range(self.readers):
                            tasks.start_soon(self._keep_reading, source)
        except Exception as error:
            self._reason = error
        finally:
            self._reason = self._reason or ServiceClosedError("the loop ended while a checkpoint was read")
            self._fail_waiting(self._reason)
            if source is not None:
                await _close(source)
            self._spare.clear()
            self.ended.set_result(None)

    def stop(self, reason: BaseException) -> bool:
        """Stop soon; waiting readers get *reason* at once. Return whether `ended` will be set."""
        self._reason = self._reason or reason
        if self._scope is not None:
            self._scope.cancel()
        self._fail_waiting(self._reason)
        return self._begun

    def _fail_waiting(self, reason: BaseException) -> None:
        """Let all waiting readers fail with *reason*."""
        for piece in (*self._under_way, *self._urgent, *self._patient, *self._window):
            _fail(piece.arrived, reason)
        _fail(self.opened, reason)
        self._urgent.clear()
        self._patient.clear()

    def follow(self, script: Sequence[tuple[int, int]]) -> None:
        """Fetch these ranges in this order from now on, as far ahead as the window allows."""
        self._script = [part for part in script if part[0] < part[1]]
        self._by_start = sorted((start, index) for index, (start, _) in enumerate(self._script))
        self._cursor = (0, self._script[0][0] if self._script else 0)
        self._drop(len(self._window))
        self._limit = self._most
        self._notify()

    def want(self, start: int, nbytes: int, target: memoryview | None) -> list[Piece]:
        """Request the *nbytes* bytes from *start* on.

        Pieces that were returned before must not be used any more, as their buffers may be reused.

        Args:
            start: where they begin in the file.
            nbytes: how many; without *target*, at most ``chunk_bytes``.
            target: memory for the bytes, unless they are in buffers of ours already; it keeps the memory alive. None if
                there is no such memory.

        Returns:
            Pieces that cover the range, in order. The first may begin before it, and the last may end after it.
        """
        if self._reason is not None:
            raise self._reason
        stop = start + nbytes
        pieces, at = self._on_its_way(start, stop)
        if at < stop:
            rest = None if target is None else target[at - start :]
            pieces += self._fetch(at, stop, rest, jumped=not pieces)
        self._notify()
        return pieces

    def gather(self, ranges: Sequence[tuple[int, Sequence[memoryview]]]) -> list[Piece]:
        """Read ranges straight into the reader's memory, in order, after all earlier requests.

        Args:
            ranges: the offset of each range and the memory for its bytes; the views keep the memory alive.

        Returns:
            A piece for each range.
        """
        if self._reason is not None:
            raise self._reason
        pieces = [Piece(start, *targets, is_ours=False) for start, targets in ranges]
        self._patient.extend(pieces)
        self._notify()
        return pieces

    # -- the plan

    @property
    def _most(self) -> int:
        return min(_WINDOW_BYTES // self.chunk_bytes, 2 * self.readers)

    def _on_its_way(self, start: int, stop: int) -> tuple[list[Piece], int]:
        """Return the window's pieces from *start* on, and their end; drop the pieces before them."""
        first = next((n for n, piece in enumerate(self._window) if piece.start <= start < piece.stop), None)
        if first is None:
            return [], start
        if first:
            self._drop(first)
            self._limit = min(2 * self._limit, self._most)
        found = []
        for piece in self._window:
            if not piece.start <= start < min(piece.stop, stop):
                break
            found.append(piece)
            start = piece.stop
        return found, start

    def _fetch(self, start: int, stop: int, target: memoryview | None, *, jumped: bool) -> list[Piece]:
        """Fetch a range that is not being fetched yet: into the window, if possible and next in the script."""
        place = self._place_in_script(start)
        follows = 0 <= start - self._read_to < self.chunk_bytes // 64
        self._read_to = stop
        if place is None or ((place, start) < self._cursor and not follows):
            return self._directly(start, stop, target)  # the window stays with what is probably next
        if jumped:
            self._drop(len(self._window))
            self._limit = min(2 * self._limit, self._most) if self._is_near(place, start) else 1
        self._cursor = (place, start)
        pieces: list[Piece] = []
        if target is None or target.nbytes < self.chunk_bytes // 4:
            while start < min(stop, self._script[place][1]) and (piece := self._next_of_script(at_once=True)):
                self._urgent.append(piece)
                pieces.append(piece)
                start = piece.stop
        if start < stop:
            self._skip_to(stop)
            rest = None if target is None else target[target.nbytes - (stop - start) :]
            pieces += self._directly(start, stop, rest)
        return pieces

    def _directly(self, start: int, stop: int, target: memoryview | None) -> list[Piece]:
        """Fetch a range past the window: into *target*, or into a buffer of its own."""
        if target is None:
            pieces = [Piece(start, memoryview(bytearray(stop - start)), is_ours=True)]
        else:
            share = -(-target.nbytes // self.readers)
            step = min(max(share, self.chunk_bytes), self._longest_read_bytes)
            cuts = range(0, target.nbytes, step)
            pieces = [Piece(start + at, target[at : at + step], is_ours=False) for at in cuts]
        self._urgent.extend(pieces)
        return pieces

    def _place_in_script(self, at: int) -> int | None:
        """Return the index of the script's range that contains *at*."""
        index = bisect_right(self._by_start, (at, len(self._script))) - 1
        if index < 0:
            return None
        place = self._by_start[index][1]
        return place if at < self._script[place][1] else None

    def _is_near(self, place: int, at: int) -> bool:
        """Return whether the reader skips only a little, such as the bytes between two records."""
        now, here = self._cursor
        if now >= len(self._script):
            return False
        left_out = at - here if place == now else self._script[now][1] - here + at - self._script[place][0]
        return 0 <= place - now <= 1 and 0 <= left_out < self.chunk_bytes

    def _skip_to(self, at: int) -> None:
        place, _ = self._cursor
        if place < len(self._script) and at >= self._script[place][1]:
            place += 1
            at = self._script[place][0] if place < len(self._script) else 0
        self._cursor = (place, at)

    def _next_of_script(self, *, at_once: bool = False) -> Piece | None:
        """Return the next piece for the window, if there is room."""
        place, start = self._cursor
        if place >= len(self._script) or (len(self._window) >= self._limit and not at_once):
            return None
        if self._spare:
            buffer = self._spare.pop()
        elif self._buffers < self._most:
            buffer = bytearray(self.chunk_bytes)
            self._buffers += 1
        else:
            return None
        stop = min(start + self.chunk_bytes, self._script[place][1])
        piece = Piece(start, memoryview(buffer)[: stop - start], is_ours=True)
        self._window.append(piece)
        self._skip_to(stop)
        return piece

    def _drop(self, count: int) -> None:
        """Remove pieces from the window; their buffers are reused once nothing writes to them."""
        for _ in range(count):
            piece = self._window.popleft()
            buffer = piece.memory.obj
            assert isinstance(buffer, bytearray)
            if piece in self._urgent:
                self._urgent.remove(piece)
                piece.arrived.set_result(None)
            piece.arrived.add_done_callback(partial(self._spare.append, buffer))

    # -- the reading

    async def _keep_reading(self, source: Source) -> None:
        while self._reason is None:  # a read that hung may come back long after `stop`
            piece = self._urgent.popleft() if self._urgent else self._next_of_script()
            if piece is None and self._patient:
                piece = self._patient.popleft()
            if piece is None:
                assert self._wake is not None
                await self._wake.wait()
                continue
            self._under_way.add(piece)
            try:
                await source.read_into(piece.start, *piece.targets)
            except Exception as error:  # raised to the reader if it ever wants the piece
                _fail(piece.arrived, error)
            except BaseException:
                _fail(piece.arrived, self._reason or ServiceClosedError("the reading was cancelled"))
                raise
            else:
                if not piece.arrived.done():
                    piece.arrived.set_result(None)
            finally:
                self._under_way.discard(piece)

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = anyio.Event()


def _fail(outcome: Outcome[None] | Outcome[int], reason: BaseException) -> None:
    if not outcome.done():
        outcome.set_exception(reason)


async def _close(source: Source) -> None:
    with anyio.CancelScope(shield=True):
        try:
            await source.aclose()
        except Exception as error:
            _log.warning("closing a file that was read: %s", redacted_text(str(error)))
