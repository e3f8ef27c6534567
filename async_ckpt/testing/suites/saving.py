"""What is at a name before, while and after a file is saved to it."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace

import anyio
import anyio.lowlevel

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.testing.doubles import BytesContent
from async_ckpt.testing.rig import StoreRig, UnderTest, cut, fact, sample

__all__ = ["Saving"]


_MOST_BYTES = 32 << 20  # for stores whose parts are large


async def _is_refused(saving: Awaitable[None]) -> None:
    try:
        await saving
    except CheckpointExistsError:
        return
    raise AssertionError("a file was replaced")


class Saving(UnderTest):
    """Facts of saves that end well."""

    @fact
    async def test_exact_bytes(self, rig: StoreRig) -> None:
        """What was put is what is read, for empty, tiny, odd and many-part files."""
        for nbytes in (0, 1, 999, 65536, 65537, 3_000_001):
            data = sample(nbytes)
            await rig.save(f"{nbytes}.ckpt", data)
            assert await rig.read(f"{nbytes}.ckpt") == data

    @fact
    async def test_invisible_before_commit(self, rig: StoreRig) -> None:
        """Until commit nothing is at the final name; after it, everything."""
        data = sample(300_000)
        location = rig.locate("new.ckpt")
        upload = await rig.store.begin(location, len(data))
        assert not await rig.store.exists(location)
        receipts = await rig.put_all(upload, data, part_bytes=1 << 16)
        assert not await rig.store.exists(location)
        assert await rig.read("new.ckpt") is None
        await upload.commit(receipts)
        assert await rig.store.exists(location)
        assert await rig.read("new.ckpt") == data

    @fact
    async def test_old_file_is_whole_until_commit(self, rig: StoreRig) -> None:
        """An earlier file stays as it was until commit, then the new one is there, also a shorter one."""
        old, new = sample(200_000, seed=5), sample(100_000, seed=6)
        await rig.save("same.ckpt", old)
        upload = await rig.store.begin(rig.locate("same.ckpt"), len(new))
        assert await rig.read("same.ckpt") == old
        receipts = await rig.put_all(upload, new, part_bytes=1 << 16)
        assert await rig.read("same.ckpt") == old
        await upload.commit(receipts)
        assert await rig.read("same.ckpt") == new

    @fact
    async def test_a_reader_during_commit(self, rig: StoreRig) -> None:
        """Whoever reads while a commit is under way finds the earlier file or the new one, whole, or is told."""
        old, new = sample(200_000, seed=5), sample(200_000, seed=6)
        await rig.save("live.ckpt", old)
        upload = await rig.store.begin(rig.locate("live.ckpt"), len(new))
        receipts = await rig.put_all(upload, new, part_bytes=1 << 16)
        found: list[bytes | None] = []
        ended = anyio.Event()

        async def look() -> None:
            while not ended.is_set():
                with suppress(StoreError):  # that it was replaced
                    found.append(await rig.read("live.ckpt"))
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(look)
            await anyio.lowlevel.checkpoint()
            await upload.commit(receipts)
            ended.set()
        torn = [data for data in found if data not in (old, new)]
        assert not torn or (not self.replaces_in_one_step and set(torn) == {None})

    @fact
    async def test_overwriting_again_and_again(self, rig: StoreRig) -> None:
        """Each of several saves of one name, all of one length, replaces the one before."""
        for seed in range(4):
            await rig.save("last.ckpt", sample(50_000, seed=seed))
            assert await rig.read("last.ckpt") == sample(50_000, seed=seed)

    @fact
    async def test_parts_in_any_order_and_at_once(self, rig: StoreRig) -> None:
        """Parts put last first, and all at once, make the same file, where the store takes that."""
        upload = await rig.store.begin(rig.locate("order.ckpt"), 1_000_003)
        await upload.abort()
        data = sample(max(1_000_003, min(2 * (upload.part_size or 0), _MOST_BYTES) + 1))
        upload = await rig.store.begin(rig.locate("order.ckpt"), len(data))
        await upload.commit(await rig.put_all(upload, data, part_bytes=37_000, reverse=True))
        assert await rig.read("order.ckpt") == data

    @fact
    async def test_a_part_may_be_put_again(self, rig: StoreRig) -> None:
        """A part put twice is in the file once, or the store says that it takes none again."""
        data = sample(200_000)
        location = rig.locate("again.ckpt")
        upload = await rig.store.begin(location, len(data))
        parts = cut(len(data), upload.part_size or 1 << 16)
        content = BytesContent(data)
        receipts = [await upload.put(part, content) for part in parts]
        try:
            receipts[0] = await upload.put(parts[0], content)
        except StoreError:
            assert upload.max_concurrent_parts == 1
        await upload.commit(receipts)
        assert await rig.read("again.ckpt") == data

    @fact
    async def test_several_uploads_at_once(self, rig: StoreRig) -> None:
        """Saves of different names that run at the same time do not meet."""
        files = {f"{number}.ckpt": sample(150_000, seed=number) for number in range(6)}
        async with anyio.create_task_group() as group:
            for name, data in files.items():
                group.start_soon(rig.save, name, data)
        for name, data in files.items():
            assert await rig.read(name) == data

    @fact
    async def test_two_uploads_of_one_name(self, rig: StoreRig) -> None:
        """Of two uploads of one name, each commit replaces the file whole, and an abort takes nothing."""
        first, second = sample(90_000, seed=1), sample(90_000, seed=2)
        uploads = [await rig.store.begin(rig.locate("one.ckpt"), 90_000) for _ in range(3)]
        receipts = [
            await rig.put_all(upload, data, part_bytes=1 << 15)
            for upload, data in zip(uploads, (first, second, first), strict=True)
        ]
        await uploads[1].commit(receipts[1])
        await uploads[2].abort()
        assert await rig.read("one.ckpt") == second
        await uploads[0].commit(receipts[0])
        assert await rig.read("one.ckpt") == first

    @fact
    async def test_new_directories(self, rig: StoreRig) -> None:
        """A save makes the directories it needs; aborted, it takes them away again."""
        upload = await rig.store.begin(rig.locate("made/for/it.ckpt"), 1)
        await upload.abort()
        assert not await rig.store.exists(rig.locate("made"))
        await rig.save("made/for/it.ckpt", b"x")
        assert await rig.read("made/for/it.ckpt") == b"x"

    @fact
    async def test_unusual_names(self, rig: StoreRig) -> None:
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
            await rig.save(name, sample(100, seed=number))
        for number, name in enumerate(names):
            assert await rig.read(name) == sample(100, seed=number)
        await rig.store.delete(rig.locate("[1]*?.ckpt"))
        assert await rig.read("a b.ckpt") is not None

    @fact
    async def test_overwrite_is_refused_where_it_is_not_wanted(self, rig: StoreRig) -> None:
        """With ``overwrite=False`` the first file of a name stays, of two at once as well, until it is deleted."""
        if (careful := self.make_careful_store(rig.workers)) is None:
            return
        careful_rig = replace(rig, store=careful)
        first, second = sample(90_000, seed=1), sample(90_000, seed=2)
        location = rig.locate("kept.ckpt")
        try:
            uploads = [await careful.begin(location, 90_000) for _ in range(2)]
            receipts = [
                await careful_rig.put_all(upload, data, part_bytes=1 << 15)
                for upload, data in zip(uploads, (first, second), strict=True)
            ]
            await uploads[0].commit(receipts[0])
            await _is_refused(uploads[1].commit(receipts[1]))
            await uploads[1].abort()
            assert await rig.read("kept.ckpt") == first
            await _is_refused(careful_rig.save("kept.ckpt", second))
            assert await rig.read("kept.ckpt") == first
            await careful.delete(location)
            await careful_rig.save("kept.ckpt", second)
            assert await rig.read("kept.ckpt") == second
        finally:
            await careful.aclose()
