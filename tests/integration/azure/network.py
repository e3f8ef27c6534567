"""Azurite behind a proxy that tells what passes, and spoils it; and saving and reading as the service does."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.lowlevel
from azure.storage.blob import (
    AccountSasPermissions,
    ResourceTypes,
    generate_account_sas,
    generate_container_sas,
)

from async_ckpt.retry import RetryPolicy, call_with_retry
from async_ckpt.stores import locate, open_store
from async_ckpt.stores.base import Location, Receipt, Store, aborted_on_error
from async_ckpt.testing import BytesContent, ThreadWorkers
from async_ckpt.testing.conformance import cut
from stress.httpfaults import response
from stress.proxy import FaultProxy
from stress.servers.process import Server
from tests.servers import fresh_bucket
from tests.support import PATIENCE_SECONDS

__all__ = [
    "BUSY",
    "IMPATIENT",
    "PART_BYTES",
    "RETRY",
    "Network",
    "Traffic",
    "body",
    "read",
    "run",
    "save",
    "store_part",
]

PART_BYTES = 256 * 1024

RETRY = RetryPolicy(attempts=5, initial_seconds=0.01, maximum_seconds=0.05)

#: Takes a server that is busy for a stall as well, so it may have to ask often.
IMPATIENT = RetryPolicy(attempts=100, initial_seconds=0.01, maximum_seconds=0.05, stall_seconds=0.3)

BUSY = response(503, headers={"x-ms-error-code": "ServerBusy"})


def body(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes that differ from seed to seed."""
    return random.Random(seed).randbytes(nbytes)


class Traffic:
    """What passes the proxy, and what is done to it; the hooks are called on the proxy's thread.

    Attributes:
        requests: what was asked, oldest first: ``block``, ``blocklist``, ``list``, ``look``, ``read``, ``delete``.
        starts: where the ranges begin that were asked for.
        answer: of a kind of request: the answer to give in the server's place.
        lose: whether to lose the server's answer to a kind of request.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.starts: list[int] = []
        self.answer: Callable[[str], bytes | None] = lambda kind: None
        self.lose: Callable[[str], bool] = lambda kind: False

    def on_request(self, method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
        self.requests.append(self.kind(method, target))
        if "x-ms-range" in headers:
            self.starts.append(int(headers["x-ms-range"].removeprefix("bytes=").split("-")[0]))
        return self.answer(self.requests[-1])

    def on_answer(self, method: str, target: str) -> bool:
        return self.lose(self.kind(method, target))

    def after(self, count: int) -> asyncio.Event:
        """Return an event of the running loop that is set by the *count*-th request from now on."""
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        awaited = len(self.requests) + count

        def answer(kind: str) -> None:
            if len(self.requests) == awaited:
                loop.call_soon_threadsafe(event.set)

        self.answer = answer
        return event

    @staticmethod
    def kind(method: str, target: str) -> str:
        comp = parse_qs(urlsplit(target).query).get("comp")
        return comp[0] if comp else {"HEAD": "look", "GET": "read", "DELETE": "delete"}[method]


class Network:
    """Azurite behind a proxy, with a container of this test's own."""

    def __init__(self, server: Server, proxy: FaultProxy, traffic: Traffic) -> None:
        self.server = server
        self.proxy = proxy
        self.traffic = traffic
        self.container = fresh_bucket(server)
        connection = server.storage_options["connection_string"].replace(server.url, proxy.url)
        self.storage_options = {"connection_string": connection}

    def url(self, name: str = "a.ckpt") -> str:
        return f"abfs://{self.container}/{name}"

    def locate(self, name: str = "a.ckpt") -> Location:
        return locate(self.url(name), storage_options=self.storage_options)

    @property
    def fields(self) -> dict[str, str]:
        """What the connection string says."""
        return dict(
            item.split("=", 1) for item in self.storage_options["connection_string"].rstrip(";").split(";")
        )

    def with_token(self, *, permission: str, hours: float = 1) -> dict[str, str]:
        """Return storage options with a token for the container instead of the account's key."""
        return self._with(
            generate_container_sas(
                self.fields["AccountName"],
                self.container,
                account_key=self.fields["AccountKey"],
                permission=permission,
                expiry=datetime.now(timezone.utc) + timedelta(hours=hours),
            )
        )

    def with_token_for_blobs(self) -> dict[str, str]:
        """Return storage options with a token to read and write the account's blobs, but not for its containers."""
        return self._with(
            generate_account_sas(
                self.fields["AccountName"],
                self.fields["AccountKey"],
                ResourceTypes(object=True),
                AccountSasPermissions(read=True, create=True, write=True),
                datetime.now(timezone.utc) + timedelta(hours=1),
            )
        )

    def _with(self, token: str) -> dict[str, str]:
        endpoint = self.fields["BlobEndpoint"]
        return {"connection_string": f"BlobEndpoint={endpoint};SharedAccessSignature={token}"}

    @asynccontextmanager
    async def store(self, **options: Any) -> AsyncIterator[Store]:
        """Open the store, and close it."""
        workers = ThreadWorkers()
        made = {"retry": RETRY, "part_size": PART_BYTES, "storage_options": self.storage_options, **options}
        store = open_store(self.locate(), workers=workers, **made)
        try:
            yield store
        finally:
            await store.aclose()
            workers.close()


async def save(store: Store, location: Location, data: bytes, retry: RetryPolicy = RETRY) -> None:
    """Save as the writer does."""
    upload = await store.begin(location, len(data))
    async with aborted_on_error(upload):
        receipts: list[Receipt] = []

        async def put(part: Any) -> None:
            receipts.append(
                await call_with_retry(retry, upload.put, part, BytesContent(data, piece_bytes=100_000))
            )

        async with anyio.create_task_group() as group:
            for part in cut(len(data), upload.part_size or PART_BYTES):
                group.start_soon(put, part)
        await upload.commit(receipts)


async def store_part(store: Store, location: Location) -> None:
    """Begin a file of one part, put it, and give up."""
    upload = await store.begin(location, 3)
    await upload.put(cut(3, 3)[0], BytesContent(b"abc"))
    await upload.abort()


async def read(store: Store, location: Location) -> bytes:
    """Read all of a file."""
    source = await store.source(location)
    data = bytearray(source.nbytes)
    await source.read_into(0, memoryview(data))
    await source.aclose()
    return bytes(data)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine on a loop of its own; one that hangs fails."""

    async def bounded() -> None:
        with anyio.fail_after(3 * PATIENCE_SECONDS):
            await test()

    anyio.run(bounded)
    gc.collect()  # an unclosed connection warns here
