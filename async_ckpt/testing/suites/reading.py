"""What is read, listed, and deleted."""

from __future__ import annotations

import time
from contextlib import aclosing

import anyio
import anyio.lowlevel

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Child, Source
from async_ckpt.testing.rig import StoreRig, UnderTest, fact, read_from, sample

__all__ = ["Reading"]

_CLOCKS_DIFFER_SECONDS = 120.0


async def _listed(rig: StoreRig, name: str, starting_with: str = "") -> list[Child]:
    """Return the children of a directory, sorted."""
    found: list[Child] = []
    async with aclosing(rig.store.list(rig.locate(name), starting_with=starting_with)) as pages:
        async for page in pages:
            found += page
    return sorted(found, key=lambda child: child.name)


class Reading(UnderTest):
    """Facts of files that are there."""

    @fact
    async def test_delete(self, rig: StoreRig) -> None:
        """Delete removes a file and nothing else; deleting what is not there is fine."""
        await rig.save("gone.ckpt", b"x")
        await rig.save("gone.ckpt.other", b"y")
        await rig.store.delete(rig.locate("gone.ckpt"))
        await rig.store.delete(rig.locate("gone.ckpt"))
        await rig.store.delete(rig.locate("was/never/there.ckpt"))
        assert await rig.read("gone.ckpt") is None
        assert not await rig.store.exists(rig.locate("gone.ckpt"))
        assert await rig.read("gone.ckpt.other") == b"y"

    @fact
    async def test_delete_a_tree(self, rig: StoreRig) -> None:
        """Delete of a directory removes all below it, and nothing beside it."""
        for name in ("tree/a.ckpt", "tree/b/c.ckpt", "tree2/d.ckpt"):
            await rig.save(name, b"x")
        await rig.store.delete(rig.locate("tree"))
        assert not await rig.store.exists(rig.locate("tree/a.ckpt"))
        assert not await rig.store.exists(rig.locate("tree/b/c.ckpt"))
        assert await rig.read("tree2/d.ckpt") == b"x"

    @fact
    async def test_listing(self, rig: StoreRig) -> None:
        """A directory's children are named, each once, with what is known of them; what is deeper or beside is not."""
        begun = time.time()
        for name in ("list/a.ckpt", "list/b/c.ckpt", "list/b/d/e.ckpt", "list/[x] *.pt", "list2/f.ckpt"):
            await rig.save(name, b"12345")
        found = await _listed(rig, "list")
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
    async def test_listing_what_begins_so(self, rig: StoreRig) -> None:
        """Of a directory's children those are named that are wanted, and none is made up."""
        for name in (".metadata", ".metadata.tmp/x", "__0_0.distcp"):
            await rig.save(f"some/{name}", b"x")
        assert [child.name for child in await _listed(rig, "some", ".metadata")] == [
            ".metadata",
            ".metadata.tmp",
        ]
        assert [child.name for child in await _listed(rig, "some", "__0_0.distcp")] == ["__0_0.distcp"]
        assert await _listed(rig, "some", "nothing") == []

    @fact
    async def test_listing_what_is_no_directory(self, rig: StoreRig) -> None:
        """Where nothing is, or a file, there is nothing below; a look that is broken off leaves nothing open."""
        await rig.save("file.ckpt", b"x")
        assert await _listed(rig, "file.ckpt") == []
        assert await _listed(rig, "never/there") == []
        await rig.save("broken/off.ckpt", b"x")
        async with aclosing(rig.store.list(rig.locate("broken"))) as pages:
            async for _ in pages:
                break

    @fact
    async def test_reading(self, rig: StoreRig) -> None:
        """Any range can be read, into one place or two places, in any order and at once where the source takes that."""
        data = sample(300_000)
        await rig.save("read.ckpt", data)
        location = rig.locate("read.ckpt")
        one, other = await rig.store.source(location), await rig.store.source(location)
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
        assert await rig.read("missing.ckpt") is None

    @fact
    async def test_a_file_that_is_replaced_while_it_is_read(self, rig: StoreRig) -> None:
        """A reader goes on with the old bytes, or is told; it never gets the new ones."""
        old, new = sample(200_000, seed=7), sample(200_000, seed=8)
        await rig.save("busy.ckpt", old)
        source = await rig.store.source(rig.locate("busy.ckpt"))
        try:
            assert await read_from(source, 0, 1000) == old[:1000]
            await rig.save("busy.ckpt", new)
            try:
                assert await read_from(source, 150_000, 200_000) == old[150_000:]
            except StoreError:
                pass
        finally:
            await source.aclose()
