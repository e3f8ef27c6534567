"""What the store of Google Cloud Storage does beside uploading: refusing, deleting, reading."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

import pytest

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs import GCSStore
from tests.strict_gcs import NAME, Fault, StrictGCS, at, on_store, save

DATA = random.Random(2).randbytes(1_000_000)


async def read(store: GCSStore, location: Location, nbytes: int = len(DATA), start: int = 0) -> bytes:
    """Return bytes of the object."""
    source = await store.source(location)
    data = bytearray(nbytes)
    await source.read_into(start, memoryview(data))
    await source.aclose()
    return bytes(data)


# -- what cannot work


def _no_bucket(server: StrictGCS) -> None:
    server.objects.clear()


def _denied(server: StrictGCS) -> None:
    server.fault = lambda _: Fault.DENIED


def _redirected(server: StrictGCS) -> None:
    server.fault = lambda _: Fault.REDIRECTED


@pytest.mark.parametrize(
    ("spoil", "advice"),
    [
        (_no_bucket, "Check that there is a bucket"),
        (_denied, "the request was anonymous"),
        (_redirected, "check endpoint_url"),
    ],
)
def test_what_cannot_work_fails_at_once(spoil: Callable[[StrictGCS], None], advice: str) -> None:
    """A missing bucket or permission fails the save with its first upload request, and says what to do."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match=advice) as failed:
            await save(store, location, DATA)
        assert not isinstance(failed.value, TransientStoreError)
        assert (failed.value.stage, failed.value.location) == ("begin", location.url)

    with StrictGCS() as server:
        spoil(server)
        on_store(server, fail)
    assert len(server.requests) <= 2


def test_a_host_that_is_not_there() -> None:
    """A name that does not resolve fails at once if it is known not to exist, and later if nobody knows."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match="cannot begin"):
            await save(store, location, DATA)

    with StrictGCS() as server:
        on_store(server, fail, endpoint_url="http://nowhere.invalid:1", retry=RetryPolicy(attempts=1))


def test_a_server_that_is_not_there() -> None:
    """A refused connection is tried again, as often as the policy says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(TransientStoreError, match="cannot begin"):
            await save(store, location, DATA)

    with StrictGCS() as server:
        on_store(server, fail, endpoint_url=f"http://127.0.0.1:{port}")


def test_options_that_gcsfs_refuses() -> None:
    """What gcsfs says of its options comes as a StoreError that names the location."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match=r"cannot begin.*access must be one of"):
            await save(store, location, DATA)

    with StrictGCS() as server:
        on_store(server, fail, access="no such")
    assert server.requests == []


@pytest.mark.parametrize("name", ["", "folder/"])
def test_what_is_no_name_of_a_file(name: str) -> None:
    """A bucket or a directory is no place for a save, and a bucket is never deleted."""

    async def refuse(store: GCSStore, _: Location) -> None:
        place = Location(url=f"gs://bucket/{name}", path=f"bucket/{name}", key="", group="")
        with pytest.raises(StoreError):
            await store.begin(place, 1)
        if not name:
            with pytest.raises(StoreError, match="names a bucket"):
                await store.delete(place)

    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, DATA))
        on_store(server, refuse)
    assert server.data(NAME) == DATA


def test_whoever_may_only_create_can_save() -> None:
    """Without the right to list and to look, a save does without looking."""
    with StrictGCS(lambda request: Fault.DENIED if request.kind in ("list", "describe") else None) as server:
        on_store(server, lambda store, location: save(store, location, DATA), overwrite=False)
    assert server.data(NAME) == DATA


# -- deleting


def test_a_tree_of_many_pages_is_deleted() -> None:
    """A directory is deleted page by page; what only begins with the same letters stays."""

    async def delete(store: GCSStore, location: Location) -> None:
        for number in range(10):
            await save(store, locate(f"gs://bucket/run/{number}/a b#1.ckpt"), b"x")
        await save(store, locate("gs://bucket/run2.ckpt"), b"y")
        await store.delete(locate("gs://bucket/run/"))

    with StrictGCS() as server:
        on_store(server, delete)
    assert list(server.objects["bucket"]) == ["run2.ckpt"]


def test_a_deletion_that_fails_is_raised_as_it_is() -> None:
    """Of several deletions that fail, one error is raised, and no group of them."""

    async def delete(store: GCSStore, location: Location) -> None:
        await save(store, location, b"x")
        with pytest.raises(StoreError, match="cannot delete"):
            await store.delete(locate("gs://bucket/run"))

    with StrictGCS(lambda request: Fault.DENIED if request.kind == "delete" else None) as server:
        on_store(server, delete)
    assert server.data(NAME) == b"x"


def test_a_deletion_that_is_sent_elsewhere_is_none() -> None:
    """A redirect is not taken for a success."""

    async def delete(store: GCSStore, location: Location) -> None:
        await save(store, location, b"x")
        with pytest.raises(StoreError, match="cannot delete"):
            await store.delete(location)

    with StrictGCS(lambda request: Fault.REDIRECTED if request.kind == "delete" else None) as server:
        on_store(server, delete)


# -- reading


def test_a_read_that_breaks_off_is_continued() -> None:
    """After a lost connection only what is missing is asked for."""

    async def save_and_read(store: GCSStore, location: Location) -> None:
        await save(store, location, DATA)
        assert await read(store, location) == DATA

    with StrictGCS(at("read", 0, Fault.HALF)) as server:
        on_store(server, save_and_read)
    assert server.kinds().count("read") == 2
    assert server.served == len(DATA)


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST, Fault.STALLED])
def test_a_read_that_fails_is_repeated(fault: Fault) -> None:
    """A read survives an error, a lost answer and a server that says nothing."""

    async def save_and_read(store: GCSStore, location: Location) -> None:
        await save(store, location, DATA)
        assert await read(store, location, 1000, start=500_000) == DATA[500_000:501_000]

    patient = RetryPolicy(attempts=100, initial_seconds=0.001, stall_seconds=0.25)
    with StrictGCS(at("read", 0, fault)) as server:
        on_store(server, save_and_read, retry=patient)


def test_a_file_replaced_or_deleted_while_it_is_read() -> None:
    """A reader never gets bytes of another generation; it is told that its own is gone."""

    async def replace(store: GCSStore, location: Location) -> None:
        await save(store, location, DATA)
        source = await store.source(location)
        await save(store, location, DATA[::-1])
        with pytest.raises(StoreError, match="replaced or deleted"):
            await source.read_into(0, memoryview(bytearray(10)))

    with StrictGCS() as server:
        on_store(server, replace)


def test_a_generation_in_the_url() -> None:
    """A URL that names a generation reads that one, and nothing is saved to it."""

    async def go(store: GCSStore, location: Location) -> None:
        await save(store, location, DATA)
        now = server.objects["bucket"][NAME].generation
        assert await read(store, locate(f"gs://bucket/{NAME}#{now}")) == DATA
        with pytest.raises(FileNotFoundError):
            await store.source(locate(f"gs://bucket/{NAME}#{now + 1}"))
        with pytest.raises(StoreError, match="one generation"):
            await store.begin(locate(f"gs://bucket/{NAME}#{now}"), 1)

    with StrictGCS() as server:
        on_store(server, go, version_aware=True)
