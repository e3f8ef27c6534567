"""The harness of the conformance suite: a store under test, and helpers for the tests.

What does not belong here: the tests themselves.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from async_ckpt.stores.base import Location, Part, Receipt, Source, Store, Upload, Workers
from async_ckpt.testing.doubles import BytesContent, ThreadWorkers

__all__ = ["StoreHarness", "UnderTest", "cut", "fact", "read_from", "sample"]


def cut(nbytes: int, part_bytes: int) -> list[Part]:
    """Return the parts of a file of *nbytes* bytes; an empty file has one empty part."""
    starts = range(0, nbytes, part_bytes) or [0]
    return [
        Part(index=index, start=start, stop=min(start + part_bytes, nbytes))
        for index, start in enumerate(starts)
    ]


def sample(nbytes: int, *, seed: int = 1) -> bytes:
    """Return pseudo-random bytes for a seed."""
    return random.Random(seed).randbytes(nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHarness:
    """A store under test, with helpers for the tests."""

    store: Store
    locate: Callable[[str], Location]
    leftovers: Callable[[], Sequence[str]]
    workers: ThreadWorkers

    async def put_all(
        self, upload: Upload, data: bytes, *, part_bytes: int, reverse: bool = False
    ) -> list[Receipt]:
        """Put all parts, as many at a time as the upload allows."""
        content = BytesContent(data)
        parts = cut(len(data), upload.part_size or part_bytes)
        if upload.max_concurrent_parts == 1:
            return [await upload.put(part, content) for part in parts]
        receipts: list[Receipt] = []

        async def put(part: Part) -> None:
            receipts.append(await upload.put(part, content))

        async with anyio.create_task_group() as group:
            for part in reversed(parts) if reverse else parts:
                group.start_soon(put, part)
        return sorted(receipts, key=lambda receipt: receipt.index)

    async def save(self, name: str, data: bytes, *, part_bytes: int = 1 << 16) -> None:
        """Save *data* as *name*."""
        upload = await self.store.begin(self.locate(name), len(data))
        await upload.commit(await self.put_all(upload, data, part_bytes=part_bytes))

    async def read(self, name: str) -> bytes | None:
        """Return the content of *name*; None if it does not exist."""
        try:
            source = await self.store.source(self.locate(name))
        except FileNotFoundError:
            return None
        try:
            return await read_from(source, 0, source.nbytes)
        finally:
            await source.aclose()


async def read_from(source: Source, start: int, stop: int) -> bytes:
    """Return the bytes *start* to *stop* of a file."""
    data = bytearray(stop - start)
    await source.read_into(start, memoryview(data))
    return bytes(data)


Fact = Callable[[Any, StoreHarness], Awaitable[None]]


def fact(test: Fact) -> Callable[[UnderTest], None]:
    """Make a test from a coroutine that takes the harness; check afterwards that nothing is left."""

    def run(self: UnderTest) -> None:
        anyio.run(self._with_harness, test)

    run.__name__ = test.__name__
    run.__qualname__ = test.__qualname__
    run.__doc__ = test.__doc__
    return run


class UnderTest:
    """What a subclass of ``StoreConformance`` defines: the store and its locations.

    Attributes:
        replaces_in_one_step: whether a name always exists while a commit replaces its file.
    """

    replaces_in_one_step = True

    def make_store(self, workers: Workers) -> Store:
        """Return a fresh store."""
        raise NotImplementedError

    def make_careful_store(self, workers: Workers) -> Store | None:
        """Return a fresh store with ``overwrite=False``; None if there is none."""
        return None

    def locate(self, name: str) -> Location:
        """Return the location of *name* in a directory that is empty when a test begins."""
        raise NotImplementedError

    def leftovers(self) -> Sequence[str]:
        """Return the names of everything in the directory besides committed checkpoints."""
        raise NotImplementedError

    def strand(self) -> str | None:
        """Leave in the directory what a dead process would, and return its name; None if the store does not sweep."""
        return None

    async def _with_harness(self, test: Fact) -> None:
        workers = ThreadWorkers(8)
        try:
            store = self.make_store(workers)
            harness = StoreHarness(store=store, locate=self.locate, leftovers=self.leftovers, workers=workers)
            try:
                await test(self, harness)
            finally:
                await store.aclose()
            assert not list(self.leftovers())
        finally:
            workers.close()
