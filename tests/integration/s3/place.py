"""What the tests of S3 share: a bucket on a real server, a network in front that misbehaves, a save without a service.

What does not belong here: tests, and what only one of their modules needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import s3fs

from async_ckpt.errors import StoreError
from async_ckpt.format.writing.parts import plan_parts
from async_ckpt.retry import RetryPolicy, call_with_retry
from async_ckpt.stores import locate
from async_ckpt.stores.base import Content, Location, Part, Receipt, aborted_on_error
from async_ckpt.stores.s3 import S3Store
from async_ckpt.stores.s3.journal import Journal
from async_ckpt.stores.s3.upload import S3Upload
from async_ckpt.testing import BytesContent, ThreadWorkers
from stress.httpfaults import response
from stress.proxy import FaultProxy
from stress.servers import s3
from stress.servers.process import Server

__all__ = [
    "LARGE",
    "MIB",
    "OLD",
    "QUICK",
    "SMALL",
    "Place",
    "Times",
    "refusal",
    "running",
    "save",
    "send",
]

MIB = 1 << 20
OLD = b"old" * 1000
SMALL = bytes(range(256)) * 4096
LARGE = SMALL * 11 + b"tail"  # three parts
QUICK = RetryPolicy(attempts=6, initial_seconds=0.01, maximum_seconds=0.05, stall_seconds=5.0)


@dataclass
class Place:
    """A bucket, and what tests do to it.

    Attributes:
        options: reach the server itself.
        requests: what the proxy has seen, by method and kind.
    """

    server: Server
    bucket: str
    folder: Path
    workers: ThreadWorkers
    stack: ExitStack
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.server.storage_options)

    def locate(self, name: str = "x.ckpt") -> Location:
        return locate(f"s3://{self.bucket}/run/{name}", storage_options=self.options)

    def proxy(
        self,
        answer: Callable[[str, Mapping[str, str]], bytes | None] = lambda kind, headers: None,
        lose: Callable[[str], bool] = lambda kind: False,
        **options: Any,
    ) -> FaultProxy:
        """Return a proxy in front of the server that knows kinds of requests."""

        def answered(method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
            self.requests[kind_of(method, target)] += 1
            return answer(kind_of(method, target), headers)

        proxy = FaultProxy(
            self.server.url,
            answer=answered,
            lose_answer=lambda method, target: lose(kind_of(method, target)),
            **options,
        )
        return self.stack.enter_context(proxy)

    def store(
        self,
        proxy: FaultProxy | None = None,
        retry: RetryPolicy = QUICK,
        file_system_class: type = s3fs.S3FileSystem,
        **options: Any,
    ) -> S3Store:
        own = {**self.options, **options.pop("storage_options", {})}
        if proxy is not None:
            own["endpoint_url"] = proxy.url
        own = {name: value for name, value in own.items() if value is not None}
        chosen = {"part_size": 5 * MIB, "journal": Journal(self.folder / "journal"), **options}
        return S3Store(file_system_class, own, workers=self.workers, retry=retry, **chosen)

    def ask(self, method: str, target: str = "", body: bytes = b"") -> bytes:
        """Ask the server itself, as whoever else uses the bucket does."""
        return s3.call(self.server.url, method, f"{self.bucket}/{target}", body)

    def read(self, name: str = "x.ckpt") -> bytes:
        return self.ask("GET", f"run/{name}")

    def put(self, data: bytes, name: str = "x.ckpt") -> None:
        self.ask("PUT", f"run/{name}", data)

    def names(self) -> list[str]:
        return re.findall("<Key>(.*?)</Key>", self.ask("GET", "?list-type=2").decode())

    def open_uploads(self) -> list[str]:
        return re.findall("<UploadId>(.*?)</UploadId>", self.ask("GET", "?uploads=").decode())

    def journals(self) -> list[Path]:
        return sorted((self.folder / "journal").glob(".*"))

    def assert_nothing_left(self) -> None:
        assert self.open_uploads() == []
        assert self.journals() == []


def kind_of(method: str, target: str) -> str:
    """Return what S3 calls a request."""
    path, _, query = target.partition("?")
    is_key = path.count("/") > 1 and not path.endswith("/")
    if "uploads" in query:
        return "Create" if method == "POST" else "ListUploads"
    if "uploadId" in query:
        return {"POST": "Complete", "DELETE": "Abort", "GET": "ListParts"}.get(method, "UploadPart")
    if method == "POST":
        return "DeleteObjects"
    return {"PUT": "Put", "HEAD": "Head", "DELETE": "Delete"}.get(method, "Get" if is_key else "List")


async def send(
    upload: S3Upload,
    content: Content,
    retry: RetryPolicy = QUICK,
    *,
    concurrent: int = 4,
    failed: Callable[[], object] = lambda: None,
) -> list[Receipt]:
    """Put every part, as a writer does; tell when one has failed."""
    receipts: list[Receipt] = []
    parts = iter(plan_parts(content.nbytes, upload.part_size))

    async def put(part: Part) -> Receipt:
        try:
            return await upload.put(part, content)
        except StoreError:
            failed()
            raise

    async def send_some() -> None:
        for part in parts:
            receipts.append(await call_with_retry(retry, put, part))

    async with anyio.create_task_group() as group:
        for _ in range(concurrent):
            group.start_soon(send_some)
    return sorted(receipts, key=lambda receipt: receipt.index)


async def save(
    store: S3Store,
    location: Location,
    data: bytes | Content,
    retry: RetryPolicy = QUICK,
    failed: Callable[[], object] = lambda: None,
    concurrent: int = 4,
) -> None:
    """Save as a writer does: abort after any error."""
    content = BytesContent(data, piece_bytes=MIB) if isinstance(data, bytes) else data
    upload = await store.begin(location, content.nbytes)
    async with aborted_on_error(upload):
        await upload.commit(await send(upload, content, retry, concurrent=concurrent, failed=failed))


def running(store: S3Store, function: Callable[[], Awaitable[Any]]) -> Any:
    """Run *function* on a loop, and close the store; return the only error of a group."""

    async def run() -> Any:
        try:
            return await function()
        except Exception as error:
            only: Any = error
            while hasattr(only, "exceptions"):
                only = only.exceptions[0]
            raise only from None
        finally:
            await store.aclose()

    return anyio.run(run)


class Times:
    """Says yes the first so many times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left >= 0


def refusal(status: int, code: str, message: str = "No.", **headers: str) -> bytes:
    """Return an answer by which S3 refuses a request."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return response(status, body.encode(), headers=headers)
