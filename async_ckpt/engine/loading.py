"""The loads of one service that are in progress.

Guarantees: a load ends with its service, whichever thread closes it, and leaves nothing open. Only a read that hangs in
storage is left behind, after a moment (B2).

What does not belong here: waiting for pending saves (service), reading (format).
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from async_ckpt.engine.loop_task import END_SECONDS, LoopTask
from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import ServiceClosedError
from async_ckpt.handle import Outcome
from async_ckpt.stores import is_local
from async_ckpt.stores.base import Location, Source, Store

if TYPE_CHECKING:
    from async_ckpt.format.reading.file import CheckpointFile

__all__ = ["Loads", "Reading"]

T = TypeVar("T")


class _Closable(Protocol):
    async def aclose(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class Reading(Protocol):
    """A read in progress on the loop thread."""

    def stop(self, reason: BaseException) -> None:
        """Stop it, from any thread; code that waits for it gets *reason*."""

    def end(self, reason: BaseException) -> bool:
        """Stop it and wait a moment for its end; return whether it has ended."""

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call *callback* once it has ended."""

    def close(self) -> None:
        """End it for good."""


class Loads:
    """Reads checkpoints; threads may share it.

    Args:
        max_concurrent_reads: how many requests of one load run at a time.
    """

    def __init__(self, max_concurrent_reads: int) -> None:
        self._max_concurrent_reads = max_concurrent_reads
        self._readings: list[Reading] = []
        self._is_over = False

    def read(
        self,
        location: Location,
        store: Store,
        runtime: Runtime,
        *,
        map_location: Any,
        keys: str | Sequence[str] | None,
        progress: bool | None,
        **unpickling: Any,
    ) -> Any:
        """Return the state at *location*; the arguments are those of ``CheckpointService.load``."""
        # Here, because few programs load, and all import this module.
        from async_ckpt.format.reading.reader import read_checkpoint
        from async_ckpt.format.reading.selection import as_patterns
        from async_ckpt.format.reading.unpickling import Unpickling

        try:
            return read_checkpoint(
                partial(self.opened, partial(store.source, location), location, runtime),
                url=location.url,
                map_location=map_location,
                unpickling=Unpickling(**unpickling),
                keys=None if keys is None else as_patterns(keys),
                progress=progress,
            )
        except Exception as error:  # torch.load raises many types, which do not name the file
            if sys.version_info >= (3, 11):
                error.add_note(f"while {location.url!r} was read")
            raise

    def run(
        self, runtime: Runtime, function: Callable[[], Awaitable[T]], *, end_seconds: float = END_SECONDS
    ) -> T:
        """Run the coroutine *function* on the loop thread, as a part of a load, and return its result.

        Args:
            runtime: runs it.
            function: makes the coroutine.
            end_seconds: how long to wait for its end once it is stopped.
        """
        task = LoopTask(runtime, function, end_seconds=end_seconds)
        with self.held(task):
            task.start()
            return task.outcome.result()

    def end(self) -> bool:
        """End every load, present and future; return whether all have ended.

        May be called repeatedly, by several threads.
        """
        self._is_over = True
        readings = list(self._readings)
        for reading in readings:  # all of them first, so that they end at the same time
            reading.stop(_closed())
        return all(reading.end(_closed()) for reading in readings)

    @contextmanager
    def kept_open(self, runtime: Runtime, open_it: Callable[[], Awaitable[C]]) -> Iterator[C]:
        """Keep something open on the loop, such as a file, during the body."""
        opened: Outcome[C] = Outcome()

        async def keep_open() -> None:
            source = await open_it()
            try:
                opened.set_result(source)
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await source.aclose()

        def tell() -> None:
            error = task.outcome.exception()
            if error is not None and not opened.done():
                opened.set_exception(error)

        task = LoopTask(runtime, keep_open)
        with self.held(task):
            task.outcome.add_done_callback(tell)
            task.start()
            yield opened.result()

    @contextmanager
    def opened(
        self,
        open_source: Callable[[], Awaitable[Source]],
        location: Location,
        runtime: Runtime,
        moved: Callable[[int], None] = lambda _: None,
    ) -> Iterator[CheckpointFile]:
        """Yield a checkpoint file that is not opened yet, and that calls *moved* with the number of bytes read."""
        from async_ckpt.format.reading.file import CheckpointFile
        from async_ckpt.format.reading.readahead import CHUNK_BYTES, ReadAhead

        near = is_local(location)
        reads = self._max_concurrent_reads
        ahead = ReadAhead(
            open_source,
            max_concurrent_reads=reads,
            chunk_bytes=CHUNK_BYTES if near or reads > 4 else 2 * CHUNK_BYTES,
            longest_read_bytes=CHUNK_BYTES if near else 4 * CHUNK_BYTES,
        )
        file = CheckpointFile(ahead, loop=runtime, url=location.url, moved=moved)
        with self.held(file):
            yield file

    @contextmanager
    def held(self, reading: Reading) -> Iterator[None]:
        """End *reading*, which has not begun, with the service, or at the latest after the body."""
        self._readings.append(reading)
        try:
            if self._is_over:  # the service was just closed
                raise _closed()
            yield
        finally:
            reading.close()
            # Last: if this is interrupted, the service ends it.
            reading.when_ended(partial(self._readings.remove, reading))


def _closed() -> ServiceClosedError:
    return ServiceClosedError("the service was closed meanwhile")
