"""Test doubles for what a store uses: workers, content, a clock."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import anyio
import anyio.lowlevel

__all__ = ["BytesContent", "ManualClock", "ThreadWorkers"]

P = ParamSpec("P")
T = TypeVar("T")


class BytesContent:
    """Content made of given bytes.

    Args:
        data: the bytes of the file.
        piece_bytes: the length of the pieces that ``read`` returns.
    """

    def __init__(self, data: bytes, *, piece_bytes: int = 1000) -> None:
        self._view = memoryview(data)
        self._piece_bytes = piece_bytes

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""
        return self._view.nbytes

    def read(self, start: int, stop: int) -> Sequence[memoryview]:
        """Return the bytes *start* to *stop* as a scatter list."""
        step = self._piece_bytes
        return [self._view[at : min(at + step, stop)] for at in range(start, stop, step)]

    def steps(self, start: int, stop: int, step_bytes: int) -> Iterator[Sequence[memoryview]]:
        """Yield the bytes *start* to *stop* in steps."""
        for at in range(start, stop, step_bytes):
            yield self.read(at, min(at + step_bytes, stop))

    def crc32(self, start: int, stop: int) -> int:
        """Return the CRC-32 of these bytes."""
        return zlib.crc32(self._view[start:stop])


class ManualClock:
    """A clock that advances only by ``sleep`` and ``advance``; nothing really waits.

    Attributes:
        naps: the seconds of every sleep, in order.
    """

    def __init__(self, start_seconds: float = 0.0) -> None:
        self._now = start_seconds
        self.naps: list[float] = []

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Advance the clock."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        """Advance the clock, and let other tasks run once."""
        self.naps.append(seconds)
        self.advance(seconds)
        await anyio.lowlevel.checkpoint()


class ThreadWorkers:
    """A bounded pool of threads, for use on one event loop; see ``stores.base.Workers``.

    Args:
        count: the number of threads.
    """

    def __init__(self, count: int = 4) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="async_ckpt-test-worker")

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a thread; a cancellation waits until it has returned."""
        future = asyncio.wrap_future(self._pool.submit(functools.partial(function, *args, **kwargs)))
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):  # from scopes; the loop below, from task.cancel()
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError as error:
                    cancelled = error
        if cancelled is not None:
            future.exception()
            raise cancelled
        return future.result()

    def close(self) -> None:
        """Wait for the threads to end."""
        self._pool.shutdown()
