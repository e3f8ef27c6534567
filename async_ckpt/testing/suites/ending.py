"""Tests of what remains of a save that fails, is aborted or cancelled, or whose process dies."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from async_ckpt.errors import StoreError
from async_ckpt.testing.doubles import BytesContent
from async_ckpt.testing.harness import StoreHarness, UnderTest, cut, fact, sample

__all__ = ["Ending"]


async def _cancelled(moment: int, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Call *function*, and cancel it once the loop has turned *moment* times."""
    async with anyio.create_task_group() as group:
        group.start_soon(function)
        for _ in range(moment):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()


class Ending(UnderTest):
    """Saves that do not succeed."""

    @fact
    async def test_commit_of_a_part_of_the_file_is_refused(self, harness: StoreHarness) -> None:
        """A commit before every byte was put raises, shows nothing, and leaves the earlier file whole."""
        old, data = sample(10_000, seed=9), sample(200_000)
        await harness.save("short.ckpt", old)
        upload = await harness.store.begin(harness.locate("short.ckpt"), len(data))
        first = cut(len(data), upload.part_size or 1 << 16)[0]
        receipts = [await upload.put(first, BytesContent(data))] if first.stop < len(data) else []
        try:
            await upload.commit(receipts)
        except StoreError:
            pass
        else:
            raise AssertionError("a torn file was committed")
        await upload.abort()
        assert await harness.read("short.ckpt") == old

    @fact
    async def test_abort_at_each_moment(self, harness: StoreHarness) -> None:
        """Abort, twice even, after begin, after some and after all parts leaves only the earlier file."""
        old, data = sample(40_000, seed=3), sample(200_000)
        await harness.save("kept.ckpt", old)
        for name in ("kept.ckpt", "never.ckpt"):
            for count in (0, 1, None):
                upload = await harness.store.begin(harness.locate(name), len(data))
                parts = cut(len(data), upload.part_size or 1 << 16)
                for part in parts[:count]:
                    await upload.put(part, BytesContent(data))
                await upload.abort()
                await upload.abort()
                assert not list(harness.leftovers())
        assert await harness.read("kept.ckpt") == old
        assert not await harness.store.exists(harness.locate("never.ckpt"))

    @fact
    async def test_abort_after_commit_changes_nothing(self, harness: StoreHarness) -> None:
        """Once committed, a file does not go away by a late abort."""
        data = sample(1000)
        upload = await harness.store.begin(harness.locate("late.ckpt"), len(data))
        await upload.commit(await harness.put_all(upload, data, part_bytes=400))
        await upload.abort()
        assert await harness.read("late.ckpt") == data

    @fact
    async def test_an_ended_upload_takes_nothing_more(self, harness: StoreHarness) -> None:
        """After abort, put and commit raise and bring nothing back."""
        data = sample(1000)
        location = harness.locate("ended.ckpt")
        upload = await harness.store.begin(location, len(data))
        await upload.abort()
        for call in (lambda: upload.put(cut(1000, 1000)[0], BytesContent(data)), lambda: upload.commit([])):
            try:
                await call()
            except StoreError:
                continue
            raise AssertionError("an aborted upload goes on")
        assert not await harness.store.exists(location)

    @fact
    async def test_cancelled_begin(self, harness: StoreHarness) -> None:
        """A begin that is cancelled leaves nothing, however far it had come."""
        location = harness.locate("cancelled.ckpt")

        async def begin() -> None:
            upload = await harness.store.begin(location, 1000)
            with anyio.CancelScope(shield=True):  # it may have been done before the cancellation came
                await upload.abort()

        async with anyio.create_task_group() as group:
            group.start_soon(begin)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert not list(harness.leftovers())
        assert not await harness.store.exists(location)

    @fact
    async def test_a_directory_is_no_target(self, harness: StoreHarness) -> None:
        """A save to the name of a directory raises, and what is in the directory stays."""
        await harness.save("folder/inside.ckpt", b"x")
        try:
            upload = await harness.store.begin(harness.locate("folder"), 1)
            await upload.abort()
        except StoreError:
            pass
        else:
            raise AssertionError("a directory was taken for a file")
        assert await harness.read("folder/inside.ckpt") == b"x"

    @fact
    async def test_cancelled_put(self, harness: StoreHarness) -> None:
        """Parts that are cancelled on their way, early or late, leave only the earlier file after the abort."""
        old, new = sample(150_000, seed=3), sample(150_000, seed=4)
        await harness.save("kept.ckpt", old)
        for moment in range(4):
            upload = await harness.store.begin(harness.locate("kept.ckpt"), len(new))
            await _cancelled(moment, partial(harness.put_all, upload, new, part_bytes=1 << 15))
            await upload.abort()
            assert not list(harness.leftovers())
            assert await harness.read("kept.ckpt") == old

    @fact
    async def test_cancelled_commit(self, harness: StoreHarness) -> None:
        """A commit that is cancelled, early or late, leaves the earlier file or the new one, and nothing else."""
        for moment in range(4):
            old, new = sample(150_000, seed=moment), sample(150_000, seed=moment + 9)
            await harness.save("either.ckpt", old)
            upload = await harness.store.begin(harness.locate("either.ckpt"), len(new))
            receipts = await harness.put_all(upload, new, part_bytes=1 << 15)
            await _cancelled(moment, partial(upload.commit, receipts))
            await upload.abort()
            assert not list(harness.leftovers())
            assert await harness.read("either.ckpt") in (old, new)

    @fact
    async def test_sweeping(self, harness: StoreHarness) -> None:
        """The first save to a place removes what a dead process left there, and names it."""
        if (name := self.strand()) is None:
            return
        upload = await harness.store.begin(harness.locate("next.ckpt"), 1)
        await upload.abort()
        assert name in upload.swept
        assert not list(harness.leftovers())

    @fact
    async def test_the_living_are_not_swept(self, harness: StoreHarness) -> None:
        """A save that is under way is left alone by another store that begins to use the place."""
        data = sample(1000)
        upload = await harness.store.begin(harness.locate("slow.ckpt"), len(data))
        receipts = await harness.put_all(upload, data, part_bytes=400)
        other = self.make_store(harness.workers)
        try:
            second = await other.begin(harness.locate("quick.ckpt"), 1)
            await second.abort()
        finally:
            await other.aclose()
        assert not second.swept
        await upload.commit(receipts)
        assert await harness.read("slow.ckpt") == data
