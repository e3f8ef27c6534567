"""The bytes of one file, on the caller's thread: waits until its `ReadAhead` has fetched them.

Guarantees: memory that the caller does not keep alive is never written to by a read, only by the caller's thread.

What does not belong here: the meaning of the bytes (`file`), the order of fetching (`readahead`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

from async_ckpt.format.reading.readahead import ReadAhead

__all__ = ["FetchedBytes", "Loop"]

P = ParamSpec("P")
T = TypeVar("T")

_MANY_BYTES = 256 << 10


class Loop(Protocol):
    """The thread of the event loop; see ``runtime.Runtime``."""

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* on that thread, and return its result; calls keep their order."""

    def spawn(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the coroutine *function* on that thread, after earlier calls; return at once."""


class FetchedBytes:
    """The bytes of one file.

    Args:
        ahead: fetches the file.
        loop: runs the fetching.

    Attributes:
        kept_to: the end of the bytes from the beginning of the file that are kept.
        kept_from: the start of the bytes at the end of the file that are kept.
    """

    def __init__(self, ahead: ReadAhead, loop: Loop) -> None:
        self.kept_to = 0
        self.kept_from = 0
        self._ahead = ahead
        self._loop = loop
        self._kept: list[tuple[int, int, memoryview]] = []  # the end comes first
        self._last: list[tuple[int, int, memoryview]] = []  # fetched last; changes with every fetch

    def keep_end(self, start: int, memory: memoryview) -> None:
        """Keep the bytes from *start* on, which are in *memory*."""
        self.kept_from = start
        self._kept = [(start, start + memory.nbytes, memory)]

    def keep_beginning(self, stop: int) -> None:
        """Fetch the bytes up to *stop*, and keep them."""
        self._kept.append((0, stop, self.fetch(0, stop)))
        self.kept_to = stop

    def forget_last(self) -> None:
        """Forget the bytes that were fetched last."""
        self._last = []

    def clear(self) -> None:
        """Free all memory."""
        self._last.clear()
        self._kept.clear()

    def arrivals(self, start: int, view: memoryview, is_kept: bool) -> Iterator[tuple[int, int]]:
        """Fill *view*, and yield its pieces in order as they arrive.

        Reads write directly into *view* only if it *is_kept*, alive with its memory for as long as one may write to it.
        """
        stop = start + view.nbytes
        for begin, end, memory in (*self._last, *self._kept):
            if begin <= start and stop <= end:
                view[:] = memory[start - begin : stop - begin]
                yield 0, view.nbytes
                return
        cut = min(stop, self.kept_from) if start < self.kept_from else stop
        at = start
        while at < cut:
            self._last = []
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
            self._last = [(piece.start, piece.stop, piece.memory) for piece in pieces if piece.is_ours]
        if cut < stop:
            _, _, tail = self._kept[0]
            view[cut - start :] = tail[: stop - cut]
            yield cut - start, view.nbytes

    def fetch(self, start: int, stop: int) -> memoryview:
        """Return the bytes *start* to *stop*, in memory of their own."""
        data = memoryview(bytearray(stop - start))
        for _ in self.arrivals(start, data, is_kept=True):
            pass
        return data


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes; for many bytes, release the GIL, which the loop's thread needs."""
    if target.nbytes < _MANY_BYTES:
        target[:] = source
        return
    byte = ctypes.c_char
    ctypes.memmove(
        ctypes.addressof(byte.from_buffer(target)), ctypes.addressof(byte.from_buffer(source)), target.nbytes
    )
