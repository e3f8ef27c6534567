"""Uploads to Google Cloud Storage, on a server that is strict and to which anything may happen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.base import Location, Part
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.stores.gcs.session import CHUNK_MULTIPLE
from async_ckpt.testing.doubles import BytesContent
from tests.strict_gcs import NAME, PART, Fault, Request, StrictGCS, at, on_store, put_all, save

OLD = b"the old one"
NEW = random.Random(1).randbytes(2 * PART + 1000)


async def save_new(store: GCSStore, location: Location) -> None:
    """Save the new checkpoint."""
    await save(store, location, NEW)


def saved_with(fault: Callable[[Request], Fault | None], **options: Any) -> StrictGCS:
    """Save over an old checkpoint while faults befall; return the server afterwards."""
    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD), overwrite=False)
        server.requests.clear()
        server.received = 0
        server.fault = fault
        on_store(server, save_new, **options)
    return server


def test_what_a_save_costs() -> None:
    """A save looks whether a directory is there, begins, sends each part, and ends with at most 256 KiB."""
    server = saved_with(lambda _: None)
    assert server.data(NAME) == NEW
    assert server.kinds() == ["list", "begin", "chunk", "chunk", "last"]
    assert server.received == len(NEW)
    assert [request.span for request in server.requests[2:]] == [
        f"bytes 0-{PART - 1}/{len(NEW)}",
        f"bytes {PART}-{2 * PART - 1}/{len(NEW)}",
        f"bytes {2 * PART}-{len(NEW) - 1}/{len(NEW)}",
    ]


@pytest.mark.parametrize(
    "nbytes", [0, 1, CHUNK_MULTIPLE - 1, CHUNK_MULTIPLE, CHUNK_MULTIPLE + 1, PART, 2 * PART]
)
def test_every_length(nbytes: int) -> None:
    """Files that end before, at and after the boundaries of chunks and parts arrive whole."""
    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, NEW[:nbytes]))
    assert server.data(NAME) == NEW[:nbytes]
    assert server.kinds().count("last") == 1
    assert server.received == nbytes


@pytest.mark.parametrize(
    ("kind", "number", "fault"),
    [
        ("begin", 0, Fault.BUSY),
        ("begin", 0, Fault.LOST),
        ("list", 0, Fault.LOST),
        ("chunk", 0, Fault.BUSY),
        ("chunk", 1, Fault.LOST),
        ("chunk", 0, Fault.HALF),
        ("chunk", 1, Fault.SHORT),
        ("last", 0, Fault.BUSY),
        ("last", 0, Fault.LOST),
        ("last", 0, Fault.SHORT),
    ],
)
def test_nothing_is_sent_twice_that_arrived(kind: str, number: int, fault: Fault) -> None:
    """After a failure sending goes on from where the server says, which it is asked."""
    server = saved_with(at(kind, number, fault))
    assert server.data(NAME) == NEW
    unkept = 0
    if fault in (Fault.HALF, Fault.SHORT):
        unkept = CHUNK_MULTIPLE if kind == "chunk" else len(NEW) % CHUNK_MULTIPLE
    assert server.received == len(NEW) + unkept
    assert server.kinds().count("begin") == 1 + (kind == "begin")
    asked = kind in ("chunk", "last") and fault is not Fault.SHORT
    assert server.kinds().count("ask") == int(asked)


def test_a_lost_answer_to_the_last_bytes_is_looked_up() -> None:
    """Where the answer to the last request was lost, the session says that the object is there."""
    server = saved_with(at("last", 0, Fault.LOST))
    assert server.kinds()[-2:] == ["last", "ask"]


def test_a_lost_answer_and_a_forgotten_session() -> None:
    """Where the session is gone as well, the object itself tells that it is ours; it is not sent again."""
    server = saved_with(at("last", 0, Fault.FORGOTTEN))
    assert server.data(NAME) == NEW
    assert server.kinds()[-3:] == ["last", "ask", "describe"]
    assert server.kinds().count("begin") == 1


def test_a_lost_answer_where_overwriting_is_forbidden() -> None:
    """What a lost answer hid is not taken for somebody else's checkpoint, which must not be replaced."""
    with StrictGCS(at("last", 0, Fault.FORGOTTEN)) as server:
        on_store(server, save_new, overwrite=False)
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 1


def test_a_commit_that_takes_effect_late() -> None:
    """What is found in the way of a repeated save is recognised as the save itself, come late."""
    with StrictGCS(at("last", 0, Fault.LATE)) as server:
        on_store(server, save_new, overwrite=False)
    assert server.data(NAME) == NEW
    assert server.kinds()[-5:] == ["last", "ask", "describe", "begin", "describe"]


@pytest.mark.parametrize(("kind", "number"), [("chunk", 0), ("chunk", 1), ("last", 0)])
def test_a_session_that_the_server_lost_is_begun_anew(kind: str, number: int) -> None:
    """An upload of which the server knows no more is sent again from its first byte, and is whole."""
    server = saved_with(at(kind, number, Fault.GONE))
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 2


def test_bytes_damaged_on_their_way_are_refused() -> None:
    """The server compares the checksum, keeps the old checkpoint, and gets the bytes again."""
    seen: list[bytes | None] = []

    def fault(request: Request) -> Fault | None:
        if request.kind != "last":
            return None
        seen.append(server.data(NAME))
        return Fault.DAMAGED if request.number == 0 else None

    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD))
        server.requests.clear()
        server.fault = fault
        on_store(server, save_new)
    assert seen == [OLD, OLD]
    assert server.data(NAME) == NEW


def test_other_bytes_stored_than_sent_do_not_stay() -> None:
    """Where a server stores other bytes than it checked, the object is deleted and sent again."""
    server = saved_with(at("last", 0, Fault.CORRUPT))
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 2
    assert "delete" in server.kinds()


def test_bytes_that_change_while_they_are_sent_are_never_stored() -> None:
    """Content that is not what it was when it was summed fails the save, and the old checkpoint stays."""
    data = bytearray(NEW)

    async def change(store: GCSStore, location: Location) -> None:
        upload = await store.begin(location, len(data))
        content = BytesContent(data)  # type: ignore[arg-type]
        await put_all(upload, content)
        data[0] ^= 1
        with pytest.raises(TransientStoreError, match="other bytes arrived"):
            await upload.commit([])
        await upload.abort()

    with StrictGCS(
        lambda request: Fault.GONE if (request.kind, request.number) == ("last", 0) else None
    ) as server:
        on_store(server, change)
    assert server.data(NAME) is None
    assert server.open_sessions == []


def test_overwriting_is_refused_before_anything_is_sent() -> None:
    """With overwrite=False a checkpoint that is there is found before the upload begins."""

    async def refuse(store: GCSStore, location: Location) -> None:
        with pytest.raises(CheckpointExistsError, match="overwrite=False"):
            await save(store, location, NEW)

    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD))
        server.requests.clear()
        on_store(server, refuse, overwrite=False)
    assert server.kinds() == ["list", "describe"]
    assert server.data(NAME) == OLD


def test_a_stalled_request_fails_and_is_repeated() -> None:
    """A request of which nothing moves ends by itself; the save goes on."""
    patient = RetryPolicy(attempts=6, initial_seconds=0.001, stall_seconds=0.25)
    server = saved_with(at("chunk", 1, Fault.STALLED), retry=patient)
    assert server.data(NAME) == NEW


def test_a_third_of_all_requests_fails() -> None:
    """With 30 % of the requests answered 503, saves still end durable, and no upload stays open."""
    chance = random.Random(7)

    async def save_often(store: GCSStore, location: Location) -> None:
        for _ in range(10):
            await save(store, location, NEW)

    with StrictGCS(lambda _: Fault.BUSY if chance.random() < 0.3 else None) as server:
        on_store(server, save_often, retry=RetryPolicy(attempts=30, initial_seconds=0.001))
    assert server.data(NAME) == NEW
    assert server.open_sessions == []


def test_a_failed_save_leaves_the_old_checkpoint() -> None:
    """A save that fails for good cancels its upload; the old checkpoint is what it was."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match=r"cannot write.*no access"):
            await save(store, location, NEW)

    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD))
        server.requests.clear()
        server.fault = lambda request: Fault.DENIED if request.kind == "chunk" else None
        on_store(server, fail)
    assert server.data(NAME) == OLD
    assert server.open_sessions == []
    assert server.kinds() == ["list", "begin", "chunk", "cancel"]


def test_cancelled_anywhere_nothing_is_left() -> None:
    """200 saves cancelled at any moment leave no upload open, and the old checkpoint or the whole new one."""
    chance = random.Random(3)
    outcomes: list[bytes | None] = []

    async def cancel(store: GCSStore, location: Location) -> None:
        await save(store, location, OLD)
        for _ in range(200):
            server.requests.clear()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(cancel_later, scope, chance.randrange(6), chance.randrange(20))
                    await save(store, location, NEW)
                    group.cancel_scope.cancel()
            assert server.open_sessions == []
            outcomes.append(server.data(NAME))
            if outcomes[-1] != OLD:
                await save(store, location, OLD)

    async def cancel_later(scope: anyio.CancelScope, requests: int, steps: int) -> None:
        while len(server.requests) < requests:
            await anyio.lowlevel.checkpoint()
        for _ in range(steps):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    with StrictGCS() as server:
        on_store(server, cancel)
    assert set(outcomes) <= {OLD, NEW}
    assert OLD in outcomes


def test_an_abort_that_fails_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An upload that cannot be cancelled raises nothing, as the save's own error is what matters."""

    async def abort(store: GCSStore, location: Location) -> None:
        upload = await store.begin(location, len(NEW))
        await upload.abort()
        await upload.abort()

    with StrictGCS(lambda request: Fault.DENIED if request.kind == "cancel" else None) as server:
        on_store(server, abort)
    assert server.kinds().count("cancel") == 1
    assert "cannot abort" in caplog.text


@pytest.mark.parametrize(
    ("reason", "good", "bad"),
    [
        ("in order", [], (PART, 2 * PART)),
        ("in order", [(0, PART)], (0, PART)),
        ("256 KiB", [], (0, PART - 1)),
    ],
)
def test_wrong_parts_are_refused(reason: str, good: list[tuple[int, int]], bad: tuple[int, int]) -> None:
    """A part out of order, or one that Google would not take, is refused before it is sent."""

    async def refuse(store: GCSStore, location: Location) -> None:
        upload = await store.begin(location, len(NEW))
        content = BytesContent(NEW)
        for index, (start, stop) in enumerate(good):
            await upload.put(Part(index=index, start=start, stop=stop), content)
        with pytest.raises(StoreError, match=reason):
            await upload.put(Part(index=1, start=bad[0], stop=bad[1]), content)
        with pytest.raises(StoreError, match="not every byte"):
            await upload.commit([])
        await upload.abort()

    with StrictGCS() as server:
        on_store(server, refuse)
    assert server.open_sessions == []
