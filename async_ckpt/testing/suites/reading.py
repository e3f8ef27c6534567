"""What is read, and what is deleted."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Source
from async_ckpt.testing.rig import StoreRig, UnderTest, fact, read_from, sample

__all__ = ["Reading"]


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
