"""A directory is listed page by page, again where it broke off, and never taken for empty because nobody answered."""

from __future__ import annotations

import ftplib
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import anyio
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Child, Location
from async_ckpt.stores.fsspec_calls import modified_in
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import FaultyDisk, ThreadWorkers
from tests.generic_doubles import OLD, TARGET, Unsteady, generic
from tests.strict_gcs.faults import Fault, at
from tests.strict_gcs.server import StrictGCS
from tests.strict_gcs.using import on_store, save
from tests.unit.stores.generic.test_ftp import Server

RUN = Location(url="double://run", path="/run", key="run", group="double")
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


async def pages_of(pages: AsyncGenerator[Sequence[Child], None]) -> list[list[str]]:
    """Return the names on each page."""
    async with aclosing(pages):
        return [[child.name for child in page] async for page in pages]


def test_a_local_directory_comes_by_the_page(workers: ThreadWorkers, tmp_path: Path) -> None:
    """A large directory is never in memory as a whole, and every name comes once."""
    for number in range(2100):
        (tmp_path / f"{number}.pt").touch()
    os.symlink(tmp_path / "gone", tmp_path / "broken.pt")
    os.symlink(tmp_path, tmp_path / "linked")
    pages = anyio.run(pages_of, LocalStore(workers=workers).list(locate(tmp_path)))
    assert sorted(chain(*pages)) == sorted([*(f"{number}.pt" for number in range(2100)), "linked"])
    assert max(map(len, pages)) <= 1000


def test_a_local_directory_that_may_not_be_looked_into(workers: ThreadWorkers, tmp_path: Path) -> None:
    """It is an error that names the directory, not an empty one; nothing stays open."""
    disk = FaultyDisk({"scan": (1, 13)})
    with pytest.raises(StoreError, match=r"cannot list .*Permission denied"):
        anyio.run(pages_of, LocalStore(workers=workers, disk=disk).list(locate(tmp_path)))


def test_pages_of_google_and_a_request_that_fails() -> None:
    """Every page is asked for, the failed one again; what the server refuses for good is an error."""
    with StrictGCS() as server:

        async def fill(store: GCSStore, location: Location) -> None:
            for number in range(7):
                await save(store, location.below(f"{number}.ckpt"), b"x")
                await save(store, location.below(f"step-{number}/x"), b"x")

        async def look(store: GCSStore, location: Location) -> None:
            found.extend(await pages_of(store.list(location)))

        found: list[list[str]] = []
        on_store(server, fill)
        server.requests.clear()
        server.fault = at("list", 1, Fault.BUSY)
        on_store(server, look)
        names = sorted(chain(*found))
        assert names == sorted([f"{n}.ckpt" for n in range(7)] + [f"step-{n}" for n in range(7)])
        assert [request.kind for request in server.requests] == ["list"] * 6
        server.requests.clear()
        server.fault = at("list", 0, Fault.DENIED)
        with pytest.raises(StoreError, match=r"cannot list .* no access"):
            on_store(server, look)


def test_a_bucket_of_google_that_is_not_there() -> None:
    """It is an error that says so: nobody has saved to it, nor could."""

    async def look(store: GCSStore, location: Location) -> None:
        await pages_of(store.list(locate("gs://nobucket/run")))

    with StrictGCS() as server, pytest.raises(StoreError, match="bucket of this name"):
        on_store(server, look)


def test_a_generic_listing_is_asked_for_again(workers: ThreadWorkers) -> None:
    """What may pass, passes."""

    class Listing(Unsteady):
        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
            self._fail("ls")
            return super().ls(path, detail=detail, **kwargs)

    fs = Listing({"ls": [ConnectionResetError(104, "reset")]}, x=OLD)
    assert anyio.run(pages_of, generic(fs, workers).list(RUN)) == [["x.ckpt"]]


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_listing_by_ftp_that_breaks_off(workers: ThreadWorkers, hangs_up: bool) -> None:
    """A listing that fails, which fsspec takes for an empty directory, is asked for again."""
    server = Server()
    server.hangs_up = hangs_up
    server.errors["MLSD"] = [ftplib.error_temp("425 Cannot open data connection.")]
    name = TARGET.path.rpartition("/")[2]
    assert anyio.run(pages_of, server.store(workers).list(RUN)) == [[name]]


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"mtime": 5.5}, 5.5),
        ({"mtime": AT}, AT.timestamp()),
        ({"LastModified": AT.replace(tzinfo=None)}, AT.timestamp()),
        ({"modify": "20260102030405"}, AT.timestamp()),
        ({"modify": "20260102030405.123"}, AT.timestamp()),
        ({"modified": "2026-01-02T03:04:05Z"}, AT.timestamp()),
        ({"Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}, AT.timestamp()),
        ({"modificationTime": 1500}, 1.5),
        ({"created": AT}, AT.timestamp()),
        ({"mtime": "yesterday", "created": AT}, AT.timestamp()),
        ({"size": 3}, None),
    ],
)
def test_when_a_file_was_written(info: dict[str, Any], seconds: float | None) -> None:
    """File systems tell it under many names and in many ways."""
    assert modified_in(info) == seconds
