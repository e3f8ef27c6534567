"""The last request of a save to a real S3 server: its outcome is known even where its answer is lost."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread
import pytest
import s3fs

from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.testing import BytesContent
from stress.httpfaults import response
from tests.integration.s3.place import LARGE, MIB, OLD, SMALL, Place, Times, running, save, send

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("kind", "data"), [("Put", SMALL), ("Complete", LARGE)])
def test_a_lost_answer_to_the_commit(place: Place, kind: str, data: bytes, overwrite: bool) -> None:
    """Where the answer to the last request is lost, the object is found to be ours, and not written twice."""
    first = Times(1)
    store = place.store(place.proxy(lose=lambda it: it == kind and first()), overwrite=overwrite)
    running(store, lambda: save(store, place.locate(), data))
    # aiohttp repeats a PUT whose kept connection turns out to be closed.
    assert place.requests[kind] <= (2 if kind == "Put" else 1)
    assert place.read() == data
    place.assert_nothing_left()


def test_every_answer_to_the_commit_lost(place: Place) -> None:
    """Even where the policy allows no second request, the outcome is looked up."""
    store = place.store(
        place.proxy(lose=lambda kind: kind == "Complete"), RetryPolicy(attempts=1), overwrite=False
    )
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == LARGE


def test_the_last_look_is_repeated(place: Place) -> None:
    """Where no commit is left to be repeated, a look that fails is, before an outcome is claimed."""
    looks = Times(3)  # one after each commit, and the first of the last
    proxy = place.proxy(
        lambda kind, _: response(500) if kind == "Head" and looks() else None, lambda kind: kind == "Complete"
    )
    store = place.store(proxy, RetryPolicy(attempts=2))
    running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == LARGE


def test_a_commit_of_which_nothing_can_be_learned(place: Place) -> None:
    """Where the object cannot be seen after a failed commit, the error says that nobody knows the outcome, and why."""
    store = place.store(
        place.proxy(lambda kind, _: response(500) if kind in ("Complete", "Head") else None),
        RetryPolicy(attempts=2, initial_seconds=0.001),
    )
    with pytest.raises(StoreError, match=r"CompleteMultipartUpload.*is unknown.*HeadObject") as told:
        running(store, lambda: save(store, place.locate(), LARGE))
    assert str(told.value).count("cannot") == 1
    place.assert_nothing_left()


def test_a_commit_that_never_arrives(place: Place) -> None:
    """Where the last request fails and what is there is another's, the save has failed, and nothing is left."""
    place.put(OLD)
    store = place.store(place.proxy(lambda kind, _: response(500) if kind == "Complete" else None))
    with pytest.raises(TransientStoreError, match="CompleteMultipartUpload"):
        running(store, lambda: save(store, place.locate(), LARGE))
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "three parts"])
def test_nothing_is_replaced(place: Place, data: bytes) -> None:
    """With overwrite=False, a checkpoint that appears while ours is sent stays, and ours fails."""
    store = place.store(overwrite=False)

    async def run() -> None:
        upload = await store.begin(place.locate(), len(data))
        receipts = await send(upload, BytesContent(data, piece_bytes=MIB))
        other = place.store()
        await save(other, place.locate(), OLD)
        await other.aclose()
        with pytest.raises(CheckpointExistsError, match=r"x\.ckpt"):
            await upload.commit(receipts)

    running(store, run)
    assert place.read() == OLD
    place.assert_nothing_left()


def test_a_slow_commit(place: Place) -> None:
    """A completion that takes longer than a stall may is found to be done, and not asked for again."""
    proxy = place.proxy()

    def recover() -> None:
        while not place.names():  # else the look would be early, and the completion rightly asked for again
            pass
        proxy.clear()

    class Looking(s3fs.S3FileSystem):  # type: ignore[misc]
        async def get_s3(self, bucket: Any = None) -> Any:
            if place.requests["Complete"]:
                await anyio.to_thread.run_sync(recover)
            return await super().get_s3(bucket)

    retry = RetryPolicy(attempts=9, initial_seconds=0.01, stall_seconds=2.0)
    store = place.store(proxy, retry, file_system_class=Looking)

    async def run() -> None:
        upload = await store.begin(place.locate(), len(LARGE))
        receipts = await send(upload, BytesContent(LARGE, piece_bytes=MIB))
        proxy.set(latency_seconds=1.2)  # each way
        await upload.commit(receipts)

    running(store, run)
    assert place.requests["Complete"] == 1
    assert place.read() == LARGE
    place.assert_nothing_left()


def test_a_race(place: Place) -> None:
    """Of sixteen saves to one name that may not replace anything, one is durable and the others fail.

    In one part each: between looking and completing an upload of several, a busy SeaweedFS lets others in.
    """
    store = place.store(overwrite=False)
    durable: list[bytes] = []
    failed: list[int] = []

    async def save_one(number: int) -> None:
        mine = bytes([number]) * len(SMALL)
        try:
            await save(store, place.locate(), mine)
        except CheckpointExistsError:
            failed.append(number)
        else:
            durable.append(mine)

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(save_one, number)

    running(store, run)
    assert len(failed) == 15
    assert durable == [place.read()]
    place.assert_nothing_left()
