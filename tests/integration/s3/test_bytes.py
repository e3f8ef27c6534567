"""Bytes between memory and a real S3 server: the same at both ends, whatever changes on the way."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from html import unescape
from itertools import pairwise

import anyio
import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Location
from async_ckpt.testing import BytesContent
from tests.integration.s3.place import LARGE, MIB, OLD, SMALL, Place, running, save
from tests.support import PATIENCE_SECONDS

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "one part", "three parts"])
def test_round_trip(place: Place, data: bytes) -> None:
    """What was saved is what anybody reads."""
    store = place.store()
    running(store, lambda: save(store, place.locate(), data))
    assert place.read() == data
    place.assert_nothing_left()


def test_same_bytes_as_torch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of a state through a service has the bytes of torch.save, and settings from the environment count."""
    for name, value in place.server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(place.folder))
    state = {"weights": torch.arange(3_000_000, dtype=torch.float32), "step": 7}
    with CheckpointService(part_size="5MiB") as service:
        service.save(state, f"s3://{place.bucket}/run/x.ckpt").wait(PATIENCE_SECONDS)
    expected = io.BytesIO()
    torch.save(state, expected)
    assert place.read() == expected.getvalue()
    place.assert_nothing_left()


def test_ranges(place: Place) -> None:
    """Any range of a file can be read, several at a time."""
    place.put(LARGE)
    store = place.store()

    async def read() -> None:
        source = await store.source(place.locate())
        assert source.nbytes == len(LARGE)
        data = bytearray(len(LARGE))
        view = memoryview(data)
        bounds = [0, 1, 5 * MIB, 5 * MIB + 3, len(LARGE)]
        async with anyio.create_task_group() as group:
            for start, stop in pairwise(bounds):
                group.start_soon(source.read_into, start, view[start:stop])
        assert bytes(data) == LARGE

    running(store, read)


def test_bytes_that_change_are_refused(place: Place) -> None:
    """A part whose bytes change after its checksum was taken is not stored, however often it is sent."""
    place.put(OLD)
    data = bytearray(LARGE)

    class Changing(BytesContent):
        def read(self, start: int, stop: int) -> list[memoryview]:
            pieces = [memoryview(data)[start:stop]]
            later.append(stop - 1)  # not sent yet when the request's head arrives
            return pieces

    later: list[int] = []

    def answer(kind: str, headers: Mapping[str, str]) -> None:
        if kind == "UploadPart":  # the checksum is in the headers already
            for each in later:
                data[each] = LARGE[each] ^ 1
            later.clear()

    store = place.store(place.proxy(answer))
    with pytest.raises(TransientStoreError, match="UploadPart"):
        running(store, lambda: save(store, place.locate(), Changing(LARGE)))
    assert place.read() == OLD
    place.assert_nothing_left()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["one part", "three parts"])
def test_checksums_count(place: Place, data: bytes) -> None:
    """What does not have the checksum that it travels with is not stored: the server compares."""

    class Miscounted(BytesContent):
        def crc32(self, start: int, stop: int) -> int:
            return super().crc32(start, stop) ^ 1

    store = place.store()
    with pytest.raises(TransientStoreError, match="BadDigest"):
        running(store, lambda: save(store, place.locate(), Miscounted(data)))
    assert place.names() == []
    place.assert_nothing_left()


@pytest.mark.parametrize(
    "name",
    ["a b", "100%", "a%20b", "a+b", "a#b", "a?b", "a&b=c", "ü-日本-😀", "a;b@c:d", "q'\"<>|*", "tail "],
)
def test_names(place: Place, name: str) -> None:
    """Whatever characters a key has, what is saved there is found, read and deleted there, and listed as such."""
    store = place.store()

    async def run() -> None:
        await save(store, place.locate(name), LARGE)
        source = await store.source(place.locate(name))
        data = bytearray(source.nbytes)
        await source.read_into(0, memoryview(data))
        assert data == LARGE
        assert [unescape(each) for each in place.names()] == [f"run/{name}"]
        await store.delete(place.locate(name))
        assert place.names() == []

    running(store, run)
    place.assert_nothing_left()


def test_versions(place: Place) -> None:
    """A URL that names a version reads and deletes that one alone, and nobody saves to it."""
    place.ask(
        "PUT", "?versioning=", b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"
    )
    store = place.store(storage_options={"version_aware": True})

    async def read(location: Location) -> bytes:
        source = await store.source(location)
        data = bytearray(source.nbytes)
        await source.read_into(0, memoryview(data))
        return bytes(data)

    async def run() -> None:
        for data in (SMALL, LARGE):
            await save(store, place.locate(), data)
        new, old = re.findall("<VersionId>(.*?)</VersionId>", place.ask("GET", "?versions=").decode())
        newer, older = (place.locate(f"x.ckpt?versionId={version}") for version in (new, old))
        assert (await read(newer), await read(older)) == (LARGE, SMALL)
        with pytest.raises(StoreError, match="nobody can save to it"):
            await save(store, older, OLD)
        await store.delete(older)
        with pytest.raises(FileNotFoundError):
            await store.source(older)
        assert await read(place.locate()) == LARGE

    running(store, run)
