"""How a file is streamed, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from async_ckpt.engine.writers import StreamingWriter
from async_ckpt.options import ServiceOptions
from async_ckpt.stores.base import Content, Location, Part, Receipt
from async_ckpt.testing import ThreadWorkers


def test_a_cancellation_is_let_in_between_parts() -> None:
    """Also of a store whose puts run in workers, and so let none in: no further part is put, and the file is undone."""

    class Upload:
        part_size, max_concurrent_parts, is_paced, swept = 1, 1, False, ()
        puts, aborts = 0, 0

        async def put(self, part: Part, content: Content) -> Receipt:
            self.puts += 1
            if self.puts == 2:
                scope.cancel()
            return Receipt(index=part.index)

        async def commit(self, receipts: Sequence[Receipt]) -> None:
            raise AssertionError("it was cancelled")

        async def abort(self) -> None:
            self.aborts += 1

    class Store:
        repeats_parts = True

        async def begin(self, location: Location, nbytes: int) -> Upload:
            return upload

    class Bytes:
        nbytes = 100

    async def play() -> None:
        nonlocal scope
        writer = StreamingWriter(Store(), workers, ServiceOptions())  # type: ignore[arg-type]
        location = Location(url="memory://x", path="x", key="memory:x", group="memory")
        with anyio.CancelScope() as scope:
            await writer.stream(Bytes(), location, ignore)  # type: ignore[arg-type]

    def ignore(*args: Any, **values: Any) -> None:
        pass

    upload, workers = Upload(), ThreadWorkers(1)
    scope: anyio.CancelScope
    anyio.run(play)
    workers.close()
    assert (upload.puts, upload.aborts) == (2, 1)
