"""The connection to Google Cloud Storage: who asks, who pays, and what is left of it."""

from __future__ import annotations

import datetime
import os
import random
import subprocess
import sys
import threading
from importlib.util import find_spec
from typing import Any

import google.auth.credentials
import pytest

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs import GCSStore
from tests.strict_gcs import Fault, Request, StrictGCS, on_store, save

DATA = random.Random(2).randbytes(1_000_000)


class Credentials(google.auth.credentials.Credentials):
    """Credentials that are renewed without anybody being asked.

    Attributes:
        threads: those that renewed them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.threads: list[int] = []

    def refresh(self, request: Any) -> None:
        """Take the next token, good for an hour."""
        self.threads.append(threading.get_ident())
        self.token = f"token-{len(self.threads)}"
        self.expire_in(datetime.timedelta(hours=1))

    def expire_in(self, time: datetime.timedelta) -> None:
        """Have the token end so much later."""
        self.expiry = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) + time


def test_credentials_without_the_right_are_told_which() -> None:
    """Who is logged in and may not save is told what the account lacks."""

    async def fail(store: GCSStore, location: Location) -> None:
        with pytest.raises(StoreError, match=r"storage\.objects\.create"):
            await save(store, location, DATA)

    with StrictGCS(lambda _: Fault.DENIED) as server:
        on_store(server, fail, token=Credentials())


def test_credentials_are_renewed_off_the_loop() -> None:
    """A token that is about to expire in the middle of an upload is renewed, once, in a worker, before what follows."""
    credentials = Credentials()

    def expire_with_the_first_chunk(request: Request) -> None:
        if (request.kind, request.number) == ("chunk", 0):
            credentials.expire_in(datetime.timedelta(seconds=1))

    async def go(store: GCSStore, location: Location) -> None:
        await save(store, location, DATA)
        assert threading.get_ident() not in credentials.threads

    with StrictGCS(expire_with_the_first_chunk) as server:
        on_store(server, go, token=credentials)
    sent = [(request.kind, request.authorization) for request in server.requests]
    assert sent == [
        ("list", "Bearer token-1"),
        ("begin", "Bearer token-1"),
        ("chunk", "Bearer token-1"),
        ("chunk", "Bearer token-2"),
        ("last", "Bearer token-2"),
    ]


def test_requester_pays() -> None:
    """The project that pays is named in every request but those of a session, whose name contains it."""
    projects: list[str] = []

    def note(request: Request) -> Fault | None:
        projects.append(request.project)
        return None

    with StrictGCS(note) as server:
        on_store(server, lambda store, location: save(store, location, DATA), requester_pays="payer")
    assert projects[:2] == ["payer", "payer"]


def test_closing_twice_and_without_use() -> None:
    """A store that was never used, and one that is closed already, can be closed."""

    async def close(store: GCSStore, _: Location) -> None:
        await store.aclose()
        await store.aclose()

    with StrictGCS() as server:
        on_store(server, close)


NO_GRPC = """
import asyncio, sys
from async_ckpt import CheckpointService
import gcsfs
assert gcsfs.GCSFileSystem.__name__ == "ExtendedGcsFileSystem"
with CheckpointService(storage_options={"endpoint_url": sys.argv[1], "token": "anon"}) as service:
    service.save({"step": 7}, "gs://bucket/a.ckpt").wait(timeout=20)
    assert service.load("gs://bucket/a.ckpt") == {"step": 7}
"""


@pytest.mark.skipif(not find_spec("gcsfs.extended_gcsfs"), reason="this gcsfs has no such file system")
def test_no_other_interface_is_asked() -> None:
    """With gcsfs's extended file system, which asks gRPC about a bucket for a minute each time, saves are quick."""
    with StrictGCS() as server:
        done = subprocess.run(
            # Google's packages warn of an old Python.
            [
                sys.executable,
                "-W",
                "error::ResourceWarning",
                "-W",
                "ignore::FutureWarning",
                "-c",
                NO_GRPC,
                server.url,
            ],
            env={**os.environ, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "true"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert server.data("a.ckpt") is not None
