"""Uploads to Google Cloud Storage, on a server that is strict and to which anything may happen."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.errors import StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Location, Part
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.stores.gcs.session import CHUNK_MULTIPLE
from async_ckpt.testing.doubles import BytesContent, ManualClock
from tests.strict_gcs import (
    NAME,
    NEW,
    OLD,
    PART,
    QUICK,
    Fault,
    Request,
    StrictGCS,
    at,
    on_store,
    save,
    saved_with,
)


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


@pytest.mark.parametrize(
    ("fault", "received"), [(Fault.NOTHING, len(NEW) + PART), (Fault.DROPPED, len(NEW) + 2 * PART)]
)
def test_a_server_that_keeps_less_than_it_was_sent(fault: Fault, received: int) -> None:
    """Where the server keeps nothing of a request, or drops what it held, sending goes on from there, in one upload."""
    server = saved_with(at("chunk", 1, fault))
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 1
    assert server.received == received


def test_a_server_that_keeps_nothing_at_all() -> None:
    """A server that goes on taking nothing fails the save, after as many requests as the policy says."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(TransientStoreError, match="the server took nothing"):
            await save(store, location, NEW)

    with StrictGCS(lambda request: Fault.NOTHING if request.kind == "chunk" else None) as server:
        on_store(server, fail)
    assert server.kinds().count("chunk") == QUICK.attempts
    assert server.open_sessions == []


def test_a_server_that_says_it_holds_more_than_it_was_sent() -> None:
    """An upload on whose length nobody agrees is cancelled, and another one begun."""
    server = saved_with(at("chunk", 0, Fault.BOASTED))
    assert server.data(NAME) == NEW
    assert server.kinds()[:5] == ["list", "begin", "chunk", "cancel", "begin"]
    assert server.open_sessions == []


@pytest.mark.parametrize("kind", ["list", "begin", "chunk", "last"])
def test_an_answer_that_is_not_googles(kind: str) -> None:
    """A page that somebody on the way gives for an answer is not taken for one; the request is repeated."""
    server = saved_with(at(kind, 0, Fault.FOREIGN))
    assert server.data(NAME) == NEW


@pytest.mark.parametrize(("kind", "number"), [("chunk", 0), ("chunk", 1), ("last", 0)])
def test_a_session_that_the_server_lost_is_begun_anew(kind: str, number: int) -> None:
    """An upload of which the server knows no more is sent again from its first byte, and is whole."""
    server = saved_with(at(kind, number, Fault.GONE))
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 2


LONG = random.Random(2).randbytes(8 * PART)
SLOW_SECONDS = 100.0  # less than the deadline, but not twice


def save_slowly(server: StrictGCS, fault: Callable[[Request], Fault | None]) -> None:
    """Save ``LONG`` by a clock on which each request takes ``SLOW_SECONDS``."""
    clock = ManualClock()
    policy = RetryPolicy(attempts=3, initial_seconds=1.0, deadline_seconds=1.5 * SLOW_SECONDS)
    retrying = Retrying(policy, clock=clock, sleep=clock.sleep)

    def slow(request: Request) -> Fault | None:
        clock.advance(SLOW_SECONDS)
        return fault(request)

    server.fault = slow
    on_store(server, lambda store, location: save(store, location, LONG, retrying=retrying))


def test_time_counts_from_what_got_on_last() -> None:
    """An upload lost late is sent again to its end, however often that fails on its way and however long it takes."""

    def fault(request: Request) -> Fault | None:
        if request.kind != "chunk" or request.number < 6:
            return None
        return Fault.GONE if request.number == 6 else None if request.number % 2 else Fault.BUSY

    with StrictGCS() as server:
        save_slowly(server, fault)
    assert server.data(NAME) == LONG
    assert server.kinds().count("begin") == 2
    assert server.kinds().count("chunk") > 15


def test_a_server_that_loses_every_upload() -> None:
    """Where whatever gets on is lost again, the save fails, and has not sent the file more than a few times."""

    def fault(request: Request) -> Fault | None:
        return Fault.GONE if request.kind == "chunk" and request.number % 4 == 3 else None

    with StrictGCS() as server:
        with pytest.raises(TransientStoreError, match="lost the upload"):
            save_slowly(server, fault)
    assert 3 * len(LONG) <= server.received <= 4 * len(LONG)
    assert server.open_sessions == []


def test_a_stalled_request_fails_and_is_repeated() -> None:
    """A request of which nothing moves ends by itself; the save goes on."""
    patient = RetryPolicy(attempts=100, initial_seconds=0.001, stall_seconds=0.25)
    server = saved_with(at("chunk", 1, Fault.STALLED), retry=patient)
    assert server.data(NAME) == NEW


def test_nothing_but_busy_answers() -> None:
    """A request that is always answered 503 is sent until the deadline, and the error says what it was."""
    retry = RetryPolicy(attempts=2, initial_seconds=0.01, maximum_seconds=0.05, deadline_seconds=0.5)

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(ThrottledError, match="cannot write"):
            await save(store, location, NEW, retrying=Retrying(retry))

    with StrictGCS(lambda request: Fault.BUSY if request.kind == "chunk" else None) as server:
        on_store(server, fail, retry=retry)
    assert server.kinds().count("chunk") > retry.attempts
    assert server.open_sessions == []


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
