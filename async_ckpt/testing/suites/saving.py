"""Tests of what is at a name before, during and after a save to it."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace

import anyio
import anyio.lowlevel

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.testing.doubles import BytesContent
from async_ckpt.testing.harness import StoreHarness, UnderTest, cut, fact, sample

__all__ = ["Saving"]


_MOST_BYTES = 32 << 20  # for stores whose parts are large


async def _is_refused(saving: Awaitable[None]) -> None:
    try:
        await saving
    except CheckpointExistsError:
        return
    raise AssertionError("a file was replaced")


class Saving(UnderTest):
    """Saves that succeed."""

    @fact
    async def test_exact_bytes(self, harness: StoreHarness) -> None:
        """What was put is what is read, for empty, tiny, odd and many-part files."""
        for nbytes in (0, 1, 999, 65536, 65537, 3_000_001):
            data = sample(nbytes)
            await harness.save(f"{nbytes}.ckpt", data)
            assert await harness.read(f"{nbytes}.ckpt") == data

    @fact
    async def test_invisible_before_commit(self, harness: StoreHarness) -> None:
        """Until commit nothing is at the final name; after it, everything."""
        data = sample(300_000)
        location = harness.locate("new.ckpt")
        upload = await harness.store.begin(location, len(data))
        assert not await harness.store.exists(location)
        receipts = await harness.put_all(upload, data, part_bytes=1 << 16)
        assert not await harness.store.exists(location)
        assert await harness.read("new.ckpt") is None
        await upload.commit(receipts)
        assert await harness.store.exists(location)
        assert await harness.read("new.ckpt") == data

    @fact
    async def test_old_file_is_whole_until_commit(self, harness: StoreHarness) -> None:
        """An earlier file stays as it was until commit, then the new one is there, also a shorter one."""
        old, new = sample(200_000, seed=5), sample(100_000, seed=6)
        await harness.save("same.ckpt", old)
        upload = await harness.store.begin(harness.locate("same.ckpt"), len(new))
        assert await harness.read("same.ckpt") == old
        receipts = await harness.put_all(upload, new, part_bytes=1 << 16)
        assert await harness.read("same.ckpt") == old
        await upload.commit(receipts)
        assert await harness.read("same.ckpt") == new

    @fact
    async def test_a_reader_during_commit(self, harness: StoreHarness) -> None:
        """Whoever reads while a commit is under way finds the earlier file or the new one, whole, or is told."""
        old, new = sample(200_000, seed=5), sample(200_000, seed=6)
        await harness.save("live.ckpt", old)
        upload = await harness.store.begin(harness.locate("live.ckpt"), len(new))
        receipts = await harness.put_all(upload, new, part_bytes=1 << 16)
        found: list[bytes | None] = []
        ended = anyio.Event()

        async def look() -> None:
            while not ended.is_set():
                with suppress(StoreError):  # that it was replaced
                    found.append(await harness.read("live.ckpt"))
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await anyio.lowlevel.checkpoint()
            await upload.commit(receipts)
            ended.set()
        torn = [data for data in found if data not in (old, new)]
        assert not torn or (not self.replaces_in_one_step and set(torn) == {None})

    @fact
    async def test_overwriting_again_and_again(self, harness: StoreHarness) -> None:
        """Each of several saves of one name, all of one length, replaces the one before."""
        for seed in range(4):
            await harness.save("last.ckpt", sample(50_000, seed=seed))
            assert await harness.read("last.ckpt") == sample(50_000, seed=seed)

    @fact
    async def test_parts_in_any_order_and_at_once(self, harness: StoreHarness) -> None:
        """Parts put last first, and all at once, make the same file, where the store takes that."""
        upload = await harness.store.begin(harness.locate("order.ckpt"), 1_000_003)
        await upload.abort()
        data = sample(max(1_000_003, min(2 * (upload.part_size or 0), _MOST_BYTES) + 1))
        upload = await harness.store.begin(harness.locate("order.ckpt"), len(data))
        await upload.commit(await harness.put_all(upload, data, part_bytes=37_000, reverse=True))
        assert await harness.read("order.ckpt") == data

    @fact
    async def test_a_part_may_be_put_again(self, harness: StoreHarness) -> None:
        """A part put twice is in the file once, or the store says that it takes none again."""
        data = sample(200_000)
        location = harness.locate("again.ckpt")
        upload = await harness.store.begin(location, len(data))
        parts = cut(len(data), upload.part_size or 1 << 16)
        content = BytesContent(data)
        receipts = [await upload.put(part, content) for part in parts]
        try:
            receipts[0] = await upload.put(parts[0], content)
        except StoreError:
            assert upload.max_concurrent_parts == 1
        await upload.commit(receipts)
        assert await harness.read("again.ckpt") == data

    @fact
    async def test_several_uploads_at_once(self, harness: StoreHarness) -> None:
        """Saves of different names that run at the same time do not meet."""
        files = {f"{number}.ckpt": sample(150_000, seed=number) for number in range(6)}
        async with anyio.create_task_group() as group:
            for name, data in files.items():
                group.start_soon(harness.save, name, data)
        for name, data in files.items():
            assert await harness.read(name) == data

    @fact
    async def test_two_uploads_of_one_name(self, harness: StoreHarness) -> None:
        """Of two uploads of one name, each commit replaces the file whole, and an abort takes nothing."""
        first, second = sample(90_000, seed=1), sample(90_000, seed=2)
        uploads = [await harness.store.begin(harness.locate("one.ckpt"), 90_000) for _ in range(3)]
        receipts = [
            await harness.put_all(upload, data, part_bytes=1 << 15)
            for upload, data in zip(uploads, (first, second, first), strict=True)
        ]
        await uploads[1].commit(receipts[1])
        await uploads[2].abort()
        assert await harness.read("one.ckpt") == second
        await uploads[0].commit(receipts[0])
        assert await harness.read("one.ckpt") == first

    @fact
    async def test_new_directories(self, harness: StoreHarness) -> None:
        """A save makes the directories it needs; aborted, it takes them away again."""
        upload = await harness.store.begin(harness.locate("made/for/it.ckpt"), 1)
        await upload.abort()
        assert not await harness.store.exists(harness.locate("made"))
        await harness.save("made/for/it.ckpt", b"x")
        assert await harness.read("made/for/it.ckpt") == b"x"

    @fact
    async def test_unusual_names(self, harness: StoreHarness) -> None:
        """Names with spaces, patterns, percent signs, other scripts and of 255 bytes are names."""
        names = [
            "a b.ckpt",
            "epoch=1-step=2.ckpt",
            "[1]*?.ckpt",
            "100%41.ckpt",
            "модель-模型.ckpt",
            "x" * 255,
        ]
        for number, name in enumerate(names):
            await harness.save(name, sample(100, seed=number))
        for number, name in enumerate(names):
            assert await harness.read(name) == sample(100, seed=number)
        await harness.store.delete(harness.locate("[1]*?.ckpt"))
        assert await harness.read("a b.ckpt") is not None

    @fact
    async def test_overwrite_is_refused_where_it_is_not_wanted(self, harness: StoreHarness) -> None:
        """With ``overwrite=False`` the first file of a name stays, of two at once as well, until it is deleted."""
        if (careful := self.make_careful_store(harness.workers)) is None:
            return
        careful_harness = replace(harness, store=careful)
        first, second = sample(90_000, seed=1), sample(90_000, seed=2)
        location = harness.locate("kept.ckpt")
        try:
            uploads = [await careful.begin(location, 90_000) for _ in range(2)]
            receipts = [
                await careful_harness.put_all(upload, data, part_bytes=1 << 15)
                for upload, data in zip(uploads, (first, second), strict=True)
            ]
            await uploads[0].commit(receipts[0])
            await _is_refused(uploads[1].commit(receipts[1]))
            await uploads[1].abort()
            assert await harness.read("kept.ckpt") == first
            await _is_refused(careful_harness.save("kept.ckpt", second))
            assert await harness.read("kept.ckpt") == first
            await careful.delete(location)
            await careful_harness.save("kept.ckpt", second)
            assert await harness.read("kept.ckpt") == second
        finally:
            await careful.aclose()
