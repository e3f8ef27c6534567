"""What is read, listed, and deleted."""

from __future__ import annotations

import time
from contextlib import aclosing

import anyio
import anyio.lowlevel

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Child, Source
from async_ckpt.testing.harness import StoreHarness, UnderTest, fact, read_from, sample

__all__ = ["Reading"]

_CLOCKS_DIFFER_SECONDS = 120.0


async def _listed(harness: StoreHarness, name: str, starting_with: str = "") -> list[Child]:
    """Return the children of a directory, sorted."""
    found: list[Child] = []
    async with aclosing(harness.store.list(harness.locate(name), starting_with=starting_with)) as pages:
        async for page in pages:
            found += page
    return sorted(found, key=lambda child: child.name)


class Reading(UnderTest):
    """Facts of files that are there."""

    @fact
    async def test_delete(self, harness: StoreHarness) -> None:
        """Delete removes a file and nothing else; deleting what is not there is fine."""
        await harness.save("gone.ckpt", b"x")
        await harness.save("gone.ckpt.other", b"y")
        await harness.store.delete(harness.locate("gone.ckpt"))
        await harness.store.delete(harness.locate("gone.ckpt"))
        await harness.store.delete(harness.locate("was/never/there.ckpt"))
        assert await harness.read("gone.ckpt") is None
        assert not await harness.store.exists(harness.locate("gone.ckpt"))
        assert await harness.read("gone.ckpt.other") == b"y"

    @fact
    async def test_delete_a_tree(self, harness: StoreHarness) -> None:
        """Delete of a directory removes all below it, and nothing beside it."""
        for name in ("tree/a.ckpt", "tree/b/c.ckpt", "tree2/d.ckpt"):
            await harness.save(name, b"x")
        await harness.store.delete(harness.locate("tree"))
        assert not await harness.store.exists(harness.locate("tree/a.ckpt"))
        assert not await harness.store.exists(harness.locate("tree/b/c.ckpt"))
        assert await harness.read("tree2/d.ckpt") == b"x"

    @fact
    async def test_listing(self, harness: StoreHarness) -> None:
        """A directory's children are named, each once, with what is known of them; what is deeper or beside is not."""
        begun = time.time()
        for name in ("list/a.ckpt", "list/b/c.ckpt", "list/b/d/e.ckpt", "list/[x] *.pt", "list2/f.ckpt"):
            await harness.save(name, b"12345")
        found = await _listed(harness, "list")
        assert [(child.name, child.is_directory) for child in found] == [
            ("[x] *.pt", False),
            ("a.ckpt", False),
            ("b", True),
        ]
        for child in found:
            assert child.is_directory or child.nbytes in (5, None)
            written = child.modified_seconds
            assert child.is_directory or written is None or abs(written - begun) < _CLOCKS_DIFFER_SECONDS

    @fact
    async def test_listing_what_begins_so(self, harness: StoreHarness) -> None:
        """Of a directory's children those are named that are wanted, and none is made up."""
        for name in (".metadata", ".metadata.tmp/x", "__0_0.distcp"):
            await harness.save(f"some/{name}", b"x")
        assert [child.name for child in await _listed(harness, "some", ".metadata")] == [
            ".metadata",
            ".metadata.tmp",
        ]
        assert [child.name for child in await _listed(harness, "some", "__0_0.distcp")] == ["__0_0.distcp"]
        assert await _listed(harness, "some", "nothing") == []

    @fact
    async def test_listing_what_is_no_directory(self, harness: StoreHarness) -> None:
        """Where nothing is, or a file, there is nothing below; a look that is broken off leaves nothing open."""
        await harness.save("file.ckpt", b"x")
        assert await _listed(harness, "file.ckpt") == []
        assert await _listed(harness, "never/there") == []
        await harness.save("broken/off.ckpt", b"x")
        async with aclosing(harness.store.list(harness.locate("broken"))) as pages:
            async for _ in pages:
                break

    @fact
    async def test_reading(self, harness: StoreHarness) -> None:
        """Any range can be read, into one place or two places, in any order and at once where the source takes that."""
        data = sample(300_000)
        await harness.save("read.ckpt", data)
        location = harness.locate("read.ckpt")
        one, other = await harness.store.source(location), await harness.store.source(location)
        ranges = [(250_000, 300_000), (0, 1), (1, 70_000), (299_999, 300_000), (5_000, 5_000)]

        async def read(source: Source, start: int, stop: int) -> None:
            assert await read_from(source, start, stop) == data[start:stop]
            first, second = bytearray((stop - start) // 3), bytearray(stop - start - (stop - start) // 3)
            await source.read_into(start, memoryview(first), memoryview(second))
            assert first + second == data[start:stop]

        try:
            assert one.nbytes == other.nbytes == len(data)
            for source in (one, other):
                if source.max_concurrent_reads == 1:
                    for start, stop in ranges:
                        await read(source, start, stop)
                    continue
                async with anyio.create_task_group() as group:
                    for start, stop in ranges:
                        group.start_soon(read, source, start, stop)
        finally:
            await one.aclose()
            await one.aclose()
            await other.aclose()
        assert await harness.read("missing.ckpt") is None

    @fact
    async def test_a_file_that_is_replaced_while_it_is_read(self, harness: StoreHarness) -> None:
        """A reader goes on with the old bytes, or is told; it never gets the new ones."""
        old, new = sample(200_000, seed=7), sample(200_000, seed=8)
        await harness.save("busy.ckpt", old)
        source = await harness.store.source(harness.locate("busy.ckpt"))
        try:
            assert await read_from(source, 0, 1000) == old[:1000]
            await harness.save("busy.ckpt", new)
            try:
                assert await read_from(source, 150_000, 200_000) == old[150_000:]
            except StoreError:
                pass
        finally:
            await source.aclose()
