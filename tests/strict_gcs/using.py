"""A store that uses the strict server."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores import locate
from async_ckpt.stores.base import Content, Location, aborted_on_error
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.stores.gcs.upload import ResumableUpload
from async_ckpt.testing.conformance import cut
from async_ckpt.testing.doubles import BytesContent, ThreadWorkers
from tests.strict_gcs.faults import Fault, Request
from tests.strict_gcs.objects import ALIGNMENT
from tests.strict_gcs.server import StrictGCS

__all__ = ["NAME", "NEW", "OLD", "PART", "QUICK", "on_store", "put_all", "save", "saved_with"]

#: What stores under test send at a time.
PART = 2 * ALIGNMENT
#: What ``on_store`` gives the location of.
NAME = "run/last.ckpt"
QUICK = RetryPolicy(attempts=6, initial_seconds=0.001, stall_seconds=10.0)
OLD = b"the old one"
NEW = random.Random(1).randbytes(2 * PART + 1000)

_QUICKLY = Retrying(QUICK)

Test = Callable[[GCSStore, Location], Awaitable[None]]


def on_store(
    server: StrictGCS, test: Test, *, retry: RetryPolicy = QUICK, overwrite: bool = True, **options: Any
) -> None:
    """Run *test* with a store of the server."""

    async def run() -> None:
        workers = ThreadWorkers(4)
        options_ = {**server.storage_options, **options}
        store = GCSStore(None, options_, workers=workers, retry=retry, overwrite=overwrite, part_size=PART)
        try:
            await test(store, locate(f"gs://bucket/{NAME}", storage_options=options_))
        finally:
            await store.aclose()
            workers.close()

    anyio.run(run)


async def put_all(upload: ResumableUpload, content: Content, *, retrying: Retrying = _QUICKLY) -> None:
    """Put every part as a writer does, again after transient errors."""
    for part in cut(content.nbytes, upload.part_size):
        await retrying.advance(upload.progress, upload.put, part, content)


async def save(store: GCSStore, location: Location, data: bytes, *, retrying: Retrying = _QUICKLY) -> None:
    """Save as a writer does."""
    upload = await store.begin(location, len(data))
    async with aborted_on_error(upload):
        await put_all(upload, BytesContent(data), retrying=retrying)
        await upload.commit([])


def saved_with(fault: Callable[[Request], Fault | None], **options: Any) -> StrictGCS:
    """Save ``NEW`` over ``OLD`` while faults befall; return the server afterwards."""
    with StrictGCS() as server:
        on_store(server, lambda store, location: save(store, location, OLD), overwrite=False)
        server.requests.clear()
        server.received = 0
        server.fault = fault
        on_store(server, lambda store, location: save(store, location, NEW), **options)
    return server
