"""What every store must do, as tests: subclass ``StoreConformance`` and run pytest.

Guarantees: a class that passes keeps what ``stores.base`` promises, as far as one process can see. That
bytes outlive the process and the power is not shown here.

::

    class TestMyStore(StoreConformance):
        def make_store(self, workers): return MyStore(workers=workers)
        def locate(self, name): return my_location(name)
        def leftovers(self): return [...]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio
import anyio.lowlevel

from async_ckpt.errors import CheckpointExistsError, StoreError
from async_ckpt.stores.base import Location, Part, Receipt, Source, Store, Upload, Workers
from async_ckpt.testing.doubles import BytesContent, ThreadWorkers

__all__ = ["StoreConformance", "StoreRig", "cut"]


def cut(nbytes: int, part_bytes: int) -> list[Part]:
    """Return the parts of a file of *nbytes* bytes; an empty file has one, empty, part."""
    starts = range(0, nbytes, part_bytes) or [0]
    return [
        Part(index=index, start=start, stop=min(start + part_bytes, nbytes))
        for index, start in enumerate(starts)
    ]


def _bytes(nbytes: int, *, seed: int = 1) -> bytes:
    """Return bytes of which no two parts are alike."""
    unit = b"".join((number * 2654435761 + seed).to_bytes(8, "little") for number in range(4096))
    return (unit * (nbytes // len(unit) + 1))[:nbytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRig:
    """A store under test, with what the tests do to it."""

    store: Store
    locate: Callable[[str], Location]
    leftovers: Callable[[], Sequence[str]]
    workers: ThreadWorkers

    async def put_all(
        self, upload: Upload, data: bytes, *, part_bytes: int, reverse: bool = False
    ) -> list[Receipt]:
        """Put every part, as many at a time as the upload takes."""
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
        """Return what is at *name*; None if nothing is."""
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


async def _is_refused(saving: Awaitable[None]) -> None:
    try:
        await saving
    except CheckpointExistsError:
        return
    raise AssertionError("a file was replaced")


Fact = Callable[[Any, StoreRig], Awaitable[None]]


def _fact(test: Fact) -> Callable[[StoreConformance], None]:
    """Make a test of a coroutine that is given the rig, and check that nothing is left."""

    def run(self: StoreConformance) -> None:
        anyio.run(self._with_rig, test)

    run.__name__ = test.__name__
    run.__qualname__ = test.__qualname__
    run.__doc__ = test.__doc__
    return run


class StoreConformance:
    """The tests; a subclass says what store, and where."""

    def make_store(self, workers: Workers) -> Store:
        """Return a fresh store."""
        raise NotImplementedError

    def make_careful_store(self, workers: Workers) -> Store | None:
        """Return a fresh store with ``overwrite=False``; None if there is no such thing."""
        return None

    def locate(self, name: str) -> Location:
        """Return the location of *name* in a place that is empty when a test begins."""
        raise NotImplementedError

    def leftovers(self) -> Sequence[str]:
        """Return the names of whatever is at the place beyond committed checkpoints."""
        raise NotImplementedError

    async def _with_rig(self, test: Fact) -> None:
        workers = ThreadWorkers(8)
        try:
            store = self.make_store(workers)
            rig = StoreRig(store=store, locate=self.locate, leftovers=self.leftovers, workers=workers)
            await test(self, rig)
            await store.aclose()
            assert not list(self.leftovers())
        finally:
            workers.close()

    @_fact
    async def test_exact_bytes(self, rig: StoreRig) -> None:
        """What was put is what is read, for empty, tiny, odd and many-part files."""
        for nbytes in (0, 1, 999, 65536, 65537, 3_000_001):
            data = _bytes(nbytes)
            await rig.save(f"{nbytes}.ckpt", data)
            assert await rig.read(f"{nbytes}.ckpt") == data

    @_fact
    async def test_invisible_before_commit(self, rig: StoreRig) -> None:
        """Until commit nothing is at the final name; after it, everything."""
        data = _bytes(300_000)
        location = rig.locate("new.ckpt")
        upload = await rig.store.begin(location, len(data))
        assert not await rig.store.exists(location)
        receipts = await rig.put_all(upload, data, part_bytes=1 << 16)
        assert not await rig.store.exists(location)
        assert await rig.read("new.ckpt") is None
        await upload.commit(receipts)
        assert await rig.store.exists(location)
        assert await rig.read("new.ckpt") == data

    @_fact
    async def test_old_file_is_whole_until_commit(self, rig: StoreRig) -> None:
        """An earlier file stays as it was until commit, then the new one is there, also a shorter one."""
        old, new = _bytes(200_000, seed=5), _bytes(100_000, seed=6)
        await rig.save("same.ckpt", old)
        upload = await rig.store.begin(rig.locate("same.ckpt"), len(new))
        assert await rig.read("same.ckpt") == old
        receipts = await rig.put_all(upload, new, part_bytes=1 << 16)
        assert await rig.read("same.ckpt") == old
        await upload.commit(receipts)
        assert await rig.read("same.ckpt") == new

    @_fact
    async def test_overwriting_again_and_again(self, rig: StoreRig) -> None:
        """Each of several saves of one name, all of one length, replaces the one before."""
        for seed in range(4):
            await rig.save("last.ckpt", _bytes(50_000, seed=seed))
            assert await rig.read("last.ckpt") == _bytes(50_000, seed=seed)

    @_fact
    async def test_parts_in_any_order_and_at_once(self, rig: StoreRig) -> None:
        """Parts put last first, and all at once, make the same file, where the store takes that."""
        data = _bytes(1_000_003)
        upload = await rig.store.begin(rig.locate("order.ckpt"), len(data))
        await upload.commit(await rig.put_all(upload, data, part_bytes=37_000, reverse=True))
        assert await rig.read("order.ckpt") == data

    @_fact
    async def test_a_part_may_be_put_again(self, rig: StoreRig) -> None:
        """A part put twice is in the file once, or the store says that it takes none again."""
        data = _bytes(200_000)
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

    @_fact
    async def test_commit_of_a_part_of_the_file_is_refused(self, rig: StoreRig) -> None:
        """A commit before every byte was put raises, shows nothing, and leaves the earlier file whole."""
        old, data = _bytes(10_000, seed=9), _bytes(200_000)
        await rig.save("short.ckpt", old)
        upload = await rig.store.begin(rig.locate("short.ckpt"), len(data))
        first = cut(len(data), upload.part_size or 1 << 16)[0]
        receipts = [await upload.put(first, BytesContent(data))] if first.stop < len(data) else []
        try:
            await upload.commit(receipts)
        except StoreError:
            pass
        else:
            raise AssertionError("a torn file was committed")
        await upload.abort()
        assert await rig.read("short.ckpt") == old

    @_fact
    async def test_abort_at_each_moment(self, rig: StoreRig) -> None:
        """Abort, twice even, after begin, after some and after all parts leaves only the earlier file."""
        old, data = _bytes(40_000, seed=3), _bytes(200_000)
        await rig.save("kept.ckpt", old)
        for name in ("kept.ckpt", "never.ckpt"):
            for count in (0, 1, None):
                upload = await rig.store.begin(rig.locate(name), len(data))
                parts = cut(len(data), upload.part_size or 1 << 16)
                for part in parts[:count]:
                    await upload.put(part, BytesContent(data))
                await upload.abort()
                await upload.abort()
                assert not list(rig.leftovers())
        assert await rig.read("kept.ckpt") == old
        assert not await rig.store.exists(rig.locate("never.ckpt"))

    @_fact
    async def test_abort_after_commit_changes_nothing(self, rig: StoreRig) -> None:
        """Once committed, a file does not go away by a late abort."""
        data = _bytes(1000)
        upload = await rig.store.begin(rig.locate("late.ckpt"), len(data))
        await upload.commit(await rig.put_all(upload, data, part_bytes=400))
        await upload.abort()
        assert await rig.read("late.ckpt") == data

    @_fact
    async def test_an_ended_upload_takes_nothing_more(self, rig: StoreRig) -> None:
        """After abort, put and commit raise and bring nothing back."""
        data = _bytes(1000)
        location = rig.locate("ended.ckpt")
        upload = await rig.store.begin(location, len(data))
        await upload.abort()
        for call in (lambda: upload.put(cut(1000, 1000)[0], BytesContent(data)), lambda: upload.commit([])):
            try:
                await call()
            except StoreError:
                continue
            raise AssertionError("an aborted upload goes on")
        assert not await rig.store.exists(location)

    @_fact
    async def test_several_uploads_at_once(self, rig: StoreRig) -> None:
        """Saves of different names that run at the same time do not meet."""
        files = {f"{number}.ckpt": _bytes(150_000, seed=number) for number in range(6)}
        async with anyio.create_task_group() as group:
            for name, data in files.items():
                group.start_soon(rig.save, name, data)
        for name, data in files.items():
            assert await rig.read(name) == data

    @_fact
    async def test_two_uploads_of_one_name(self, rig: StoreRig) -> None:
        """Of two uploads of one name, each commit replaces the file whole, and an abort takes nothing."""
        first, second = _bytes(90_000, seed=1), _bytes(90_000, seed=2)
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

    @_fact
    async def test_delete(self, rig: StoreRig) -> None:
        """Delete removes a file and nothing else; deleting what is not there is fine."""
        await rig.save("gone.ckpt", b"x")
        await rig.save("gone.ckpt.other", b"y")
        await rig.store.delete(rig.locate("gone.ckpt"))
        await rig.store.delete(rig.locate("gone.ckpt"))
        await rig.store.delete(rig.locate("was/never/there.ckpt"))
        assert await rig.read("gone.ckpt") is None
        assert await rig.read("gone.ckpt.other") == b"y"

    @_fact
    async def test_delete_a_tree(self, rig: StoreRig) -> None:
        """Delete of a directory removes all below it, and nothing beside it."""
        for name in ("tree/a.ckpt", "tree/b/c.ckpt", "tree2/d.ckpt"):
            await rig.save(name, b"x")
        await rig.store.delete(rig.locate("tree"))
        assert not await rig.store.exists(rig.locate("tree/a.ckpt"))
        assert not await rig.store.exists(rig.locate("tree/b/c.ckpt"))
        assert await rig.read("tree2/d.ckpt") == b"x"

    @_fact
    async def test_a_directory_is_no_target(self, rig: StoreRig) -> None:
        """A save to the name of a directory raises, and what is in the directory stays."""
        await rig.save("folder/inside.ckpt", b"x")
        try:
            upload = await rig.store.begin(rig.locate("folder"), 1)
            await upload.abort()
        except StoreError:
            pass
        else:
            raise AssertionError("a directory was taken for a file")
        assert await rig.read("folder/inside.ckpt") == b"x"

    @_fact
    async def test_new_directories(self, rig: StoreRig) -> None:
        """A save makes the directories it needs; aborted, it takes them away again."""
        upload = await rig.store.begin(rig.locate("made/for/it.ckpt"), 1)
        await upload.abort()
        assert not await rig.store.exists(rig.locate("made"))
        await rig.save("made/for/it.ckpt", b"x")
        assert await rig.read("made/for/it.ckpt") == b"x"

    @_fact
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
            await rig.save(name, _bytes(100, seed=number))
        for number, name in enumerate(names):
            assert await rig.read(name) == _bytes(100, seed=number)
        await rig.store.delete(rig.locate("[1]*?.ckpt"))
        assert await rig.read("a b.ckpt") is not None

    @_fact
    async def test_reading(self, rig: StoreRig) -> None:
        """Any range can be read, into one place or two places, in any order and at once where the source takes that."""
        data = _bytes(300_000)
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

    @_fact
    async def test_a_file_that_is_replaced_while_it_is_read(self, rig: StoreRig) -> None:
        """A reader goes on with the old bytes, or is told; it never gets the new ones."""
        old, new = _bytes(200_000, seed=7), _bytes(200_000, seed=8)
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

    @_fact
    async def test_overwrite_is_refused_where_it_is_not_wanted(self, rig: StoreRig) -> None:
        """With ``overwrite=False`` the first file of a name stays, of two at once as well, until it is deleted."""
        if (careful := self.make_careful_store(rig.workers)) is None:
            return
        careful_rig = replace(rig, store=careful)
        first, second = _bytes(90_000, seed=1), _bytes(90_000, seed=2)
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

    @_fact
    async def test_cancelled_begin(self, rig: StoreRig) -> None:
        """A begin that is cancelled leaves nothing, however far it had come."""
        location = rig.locate("cancelled.ckpt")

        async def begin() -> None:
            upload = await rig.store.begin(location, 1000)
            with anyio.CancelScope(shield=True):  # it may have been done before the cancellation came
                await upload.abort()

        async with anyio.create_task_group() as group:
            group.start_soon(begin)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        assert not list(rig.leftovers())
        assert not await rig.store.exists(location)
