"""How an upload to Google Cloud Storage ends: with the right bytes, once, and known to whoever sent them."""

from __future__ import annotations

import anyio
import pytest

from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.testing.doubles import BytesContent
from tests.strict_gcs import (
    NAME,
    NEW,
    OLD,
    PART,
    Fault,
    Request,
    StrictGCS,
    at,
    on_store,
    put_all,
    save,
    saved_with,
)


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


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.FORGOTTEN])
def test_a_lost_answer_to_the_last_attempt(fault: Fault) -> None:
    """Nobody claims a failure before the object was looked at, even where nothing is to be repeated (E3)."""
    server = saved_with(at("last", 0, fault), retry=RetryPolicy(attempts=1))
    assert server.data(NAME) == NEW
    assert server.kinds()[-2:] == ["last", "describe"]


def test_the_last_look_is_repeated() -> None:
    """Where no commit is left to be repeated, a look that fails is, before an outcome is claimed."""

    def fault(request: Request) -> Fault | None:
        return {("last", 0): Fault.FORGOTTEN, ("describe", 0): Fault.BUSY, ("describe", 1): Fault.BUSY}.get(
            (request.kind, request.number)
        )

    server = saved_with(fault, retry=RetryPolicy(attempts=2, initial_seconds=0.001))
    assert server.data(NAME) == NEW
    assert server.kinds()[-5:] == ["last", "ask", "describe", "describe", "describe"]


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.GONE, Fault.STALLED])
def test_a_last_attempt_that_failed(fault: Fault) -> None:
    """A commit that did not happen is a failure, after a look at the object, which is the old one."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(TransientStoreError, match="cannot commit"):
            await save(store, location, NEW)

    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD))
        server.requests.clear()
        server.fault = at("last", 0, fault)
        on_store(server, fail, retry=RetryPolicy(attempts=1, stall_seconds=1.0))
    assert server.data(NAME) == OLD
    assert server.kinds()[3:] == ["chunk", "last", "describe", *["cancel"] * (fault is not Fault.GONE)]
    assert server.open_sessions == []


def test_a_commit_of_which_nothing_can_be_learned() -> None:
    """Where the object cannot be looked at after a lost answer, the error says that the outcome is not known."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match=r"is unknown whether it took effect.*HTTP 403") as told:
            await save(store, location, NEW)
        assert str(told.value).count("cannot") == 1

    def fault(request: Request) -> Fault | None:
        return {"last": Fault.LOST, "ask": Fault.DENIED, "describe": Fault.DENIED}.get(request.kind)

    with StrictGCS(fault) as server:
        on_store(server, fail)


def test_a_lost_answer_where_overwriting_is_forbidden() -> None:
    """What a lost answer hid is not taken for somebody else's checkpoint, which must not be replaced."""
    with StrictGCS(at("last", 0, Fault.FORGOTTEN)) as server:
        on_store(server, lambda store, location: save(store, location, NEW), overwrite=False)
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 1


def test_a_commit_for_which_everything_is_sent_again() -> None:
    """Where the upload is lost with the last bytes, each failure on the way of what is sent again counts anew."""
    lost: list[Request] = []

    def fault(request: Request) -> Fault | None:
        if (request.kind, request.number) == ("last", 0):
            lost.append(request)
            return Fault.GONE
        return Fault.BUSY if lost and request.kind == "chunk" and request.number % 2 else None

    server = saved_with(fault, retry=RetryPolicy(attempts=2, initial_seconds=0.001))
    assert server.data(NAME) == NEW
    assert server.kinds().count("begin") == 2


def test_a_commit_that_takes_effect_late() -> None:
    """What is found in the way of a repeated save is recognised as the save itself, come late."""
    with StrictGCS(at("last", 0, Fault.LATE)) as server:
        on_store(server, lambda store, location: save(store, location, NEW), overwrite=False)
    assert server.data(NAME) == NEW
    assert server.kinds()[-5:] == ["last", "ask", "describe", "begin", "describe"]


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
        on_store(server, lambda store, location: save(store, location, NEW))
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


def test_whoever_may_not_look_is_told_that_a_checkpoint_is_there() -> None:
    """A checkpoint that came meanwhile is called that by who may only create, too: nothing of it is in doubt."""

    async def be_late(store: GCSStore, location: Location) -> None:
        upload = await store.begin(location, len(NEW))
        await put_all(upload, BytesContent(NEW))
        await save(store, location, OLD)
        with pytest.raises(CheckpointExistsError):
            await upload.commit([])
        await upload.abort()

    with StrictGCS(lambda request: Fault.DENIED if request.kind == "describe" else None) as server:
        on_store(server, be_late, overwrite=False)
    assert server.data(NAME) == OLD
    assert server.open_sessions == []


def test_of_many_that_must_not_replace_one_wins() -> None:
    """Of 16 saves of a name at once with overwrite=False one is stored, and the others are told."""
    told: list[int] = []

    async def race(store: GCSStore, location: Location) -> None:
        async def one(number: int) -> None:
            try:
                await save(store, location, bytes([number]) * PART)
            except CheckpointExistsError:
                told.append(number)

        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(one, number)

    with StrictGCS() as server:
        on_store(server, race, overwrite=False)
    (winner,) = set(range(16)) - set(told)
    assert server.data(NAME) == bytes([winner]) * PART
    assert server.open_sessions == []
