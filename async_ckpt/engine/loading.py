"""The loads of one service that are under way.

Guarantees: a load ends with its service, whoever is closing it, and leaves nothing open, but for a read that storage
holds up: that is waited for a moment, and then left behind (B2).

What does not belong here: waiting for pending saves (service), reading (format).
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from async_ckpt.engine.errand import Errand
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
    """Something that is read on the loop thread."""

    def stop(self, reason: BaseException) -> None:
        """Have it end, from any thread; who waits for it gets *reason*."""

    def end(self, reason: BaseException) -> bool:
        """Do that, and wait for the end, but not for long; return whether it has come."""

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call *callback* once nothing is under way any more."""

    def close(self) -> None:
        """End it for good."""


class Loads:
    """Reads checkpoints; threads may share it.

    Args:
        max_concurrent_reads: requests at a time of one load.
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
        except Exception as error:  # torch.load's own, of many kinds, which name no file
            if sys.version_info >= (3, 11):
                error.add_note(f"while {location.url!r} was read")
            raise

    def run(self, runtime: Runtime, function: Callable[[], Awaitable[T]]) -> T:
        """Return what the coroutine *function* returns, which runs on the loop thread, as a part of a load."""
        errand = Errand(runtime, function)
        with self.held(errand):
            errand.start()
            return errand.outcome.result()

    def end(self) -> bool:
        """End every load, now and later ones as well; return whether nothing of them is under way any more.

        May be called again, by several threads.
        """
        self._is_over = True
        readings = list(self._readings)
        for reading in readings:  # all of them first: they are waited for together
            reading.stop(_closed())
        return all(reading.end(_closed()) for reading in readings)

    @contextmanager
    def kept_open(self, runtime: Runtime, open_it: Callable[[], Awaitable[C]]) -> Iterator[C]:
        """Hold something open, such as a file, from which several things are read."""
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
            error = errand.outcome.exception()
            if error is not None and not opened.done():
                opened.set_exception(error)

        errand = Errand(runtime, keep_open)
        with self.held(errand):
            errand.outcome.add_done_callback(tell)
            errand.start()
            yield opened.result()

    @contextmanager
    def opened(
        self,
        open_source: Callable[[], Awaitable[Source]],
        location: Location,
        runtime: Runtime,
        moved: Callable[[int], None] = lambda _: None,
    ) -> Iterator[CheckpointFile]:
        """Give a file, not started yet, that tells *moved* how many bytes have come."""
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
        """Have *reading*, which has not begun, end with the service, and at the end of this at the latest."""
        self._readings.append(reading)
        try:
            if self._is_over:  # just now, by one who does not know of it
                raise _closed()
            yield
        finally:
            reading.close()
            # Last: who interrupts this leaves it to the service.
            reading.when_ended(partial(self._readings.remove, reading))


def _closed() -> ServiceClosedError:
    return ServiceClosedError("the service was closed meanwhile")
