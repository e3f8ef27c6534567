"""Google Cloud Storage as its documentation describes it, in memory, with faults on demand; for tests.

fake-gcs-server is a real server, but lenient: it takes chunks of any length at any offset, ends an upload when it is
asked how far it has come, and checks neither checksums nor preconditions of resumable uploads. This double checks all
of them, and answers, loses, cuts and corrupts as a test asks. It is no proof that Google does the same.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import anyio
from aiohttp import web
from anyio.from_thread import BlockingPortal, start_blocking_portal

from async_ckpt.retry import RetryPolicy, call_with_retry
from async_ckpt.stores import locate
from async_ckpt.stores.base import Content, Location
from async_ckpt.stores.checksums import as_text, crc32c
from async_ckpt.stores.gcs import GCSStore
from async_ckpt.stores.gcs.upload import ResumableUpload
from async_ckpt.testing.conformance import cut
from async_ckpt.testing.doubles import BytesContent, ThreadWorkers

__all__ = [
    "ALIGNMENT",
    "NAME",
    "PART",
    "QUICK",
    "Fault",
    "Request",
    "StrictGCS",
    "at",
    "on_store",
    "put_all",
    "save",
]

ALIGNMENT = 256 * 1024
#: What stores under test send at a time.
PART = 2 * ALIGNMENT
#: What ``on_store`` gives the location of.
NAME = "run/last.ckpt"
QUICK = RetryPolicy(attempts=6, initial_seconds=0.001, stall_seconds=10.0)
HOST = "127.0.0.1"


class Fault(enum.Enum):
    """What may befall a request."""

    BUSY = "answered 503, not carried out"
    DENIED = "answered 403, not carried out"
    LOST = "carried out, and the connection reset instead of an answer"
    FORGOTTEN = "the same, and the session is forgotten too"
    HALF = "half of the bytes kept, then the connection reset"
    SHORT = "half of the bytes kept, and said so"
    GONE = "the session forgotten, answered 410"
    STALLED = "neither read nor answered"
    LATE = "carried out, unanswered, when the next upload begins; the session is forgotten at once"
    DAMAGED = "one byte changed on the way in"
    CORRUPT = "one byte changed after every check"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as a test sees it.

    Attributes:
        kind: ``begin``, ``chunk``, ``last``, ``ask``, ``cancel``, ``describe``, ``read``, ``list`` or ``delete``.
        number: how many of its kind came before it.
        key: the object's name, as far as the request tells.
        span: its Content-Range or Range.
        authorization: its credentials.
        project: whose it is to pay.
    """

    kind: str
    number: int
    key: str
    span: str
    authorization: str
    project: str


@dataclass
class _Object:
    data: bytes
    generation: int
    metadata: dict[str, str]

    def describe(self, bucket: str, key: str) -> dict[str, Any]:
        return {
            "name": key,
            "bucket": bucket,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metadata": self.metadata,
            "crc32c": as_text(crc32c([memoryview(self.data)])),
        }


@dataclass
class _Session:
    bucket: str
    key: str
    metadata: dict[str, str]
    match: str | None
    total: int
    data: bytearray = field(default_factory=bytearray)
    done: dict[str, Any] | None = None


class _Lost(Exception):
    """No answer is to be sent."""


class _No(Exception):
    def __init__(self, status: int, message: str, reason: str = "invalid") -> None:
        self.status = status
        body = {"error": {"code": status, "message": message, "errors": [{"reason": reason}]}}
        self.text = json.dumps(body)


class StrictGCS:
    """A context manager; inside, the server answers at ``url``, on a thread of its own.

    Args:
        fault: asked of every request, on the server's thread.
        page: objects that a listing names at a time.

    Attributes:
        objects: by bucket and name.
        requests: what came, in order.
        received: bytes of data that came, over all uploads.
        served: bytes of data that were sent.
    """

    def __init__(self, fault: Callable[[Request], Fault | None] = lambda _: None, *, page: int = 3) -> None:
        self.fault = fault
        self.objects: dict[str, dict[str, _Object]] = {"bucket": {}}
        self.requests: list[Request] = []
        self.received = 0
        self.served = 0
        self._page = page
        self._sessions: dict[str, _Session] = {}
        self._late: list[_Session] = []
        self._ids = itertools.count(1)
        self._stack = ExitStack()

    def __enter__(self) -> StrictGCS:
        """Start to serve."""
        with ExitStack() as stack:
            portal: BlockingPortal = stack.enter_context(start_blocking_portal("asyncio"))
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._answer)
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
            portal.call(runner.setup)
            stack.callback(portal.call, runner.cleanup)
            site = web.TCPSite(runner, HOST, 0)
            portal.call(site.start)
            self.url = f"http://{HOST}:{runner.addresses[0][1]}"
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every connection."""
        self._stack.close()

    @property
    def storage_options(self) -> dict[str, Any]:
        """What gcsfs is given to reach it."""
        return {"endpoint_url": self.url, "token": "anon", "project": "tests"}

    @property
    def open_sessions(self) -> list[str]:
        """The names of what is being uploaded."""
        return [session.key for session in self._sessions.values() if session.done is None]

    def data(self, key: str) -> bytes | None:
        """Return what is stored under *key*."""
        found = self.objects["bucket"].get(key)
        return found.data if found else None

    def kinds(self) -> list[str]:
        """Return the kinds of the requests that came."""
        return [request.kind for request in self.requests]

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        fault: Fault | None = None
        try:
            kind, rest = self._classify(http)
            request = Request(
                kind=kind,
                number=self.kinds().count(kind),
                key=self._key(http, rest),
                span=http.headers.get("Content-Range", http.headers.get("Range", "")),
                authorization=http.headers.get("Authorization", ""),
                project=http.query.get("userProject", ""),
            )
            self.requests.append(request)
            fault = self.fault(request)
            if fault is Fault.STALLED:
                await asyncio.Event().wait()
            if fault is Fault.BUSY:
                raise _No(503, "Backend unavailable", "backendError")
            if fault is Fault.DENIED:
                raise _No(403, "Caller has no access", "forbidden")
            if fault is Fault.GONE:
                del self._sessions[http.query["upload_id"]]
                raise _No(410, "The session is gone")
            return self._checked(await getattr(self, f"_{kind}")(http, rest, fault), fault, http)
        except _No as no:
            return web.Response(status=no.status, text=no.text, content_type="application/json")
        except _Lost:
            return self._reset(http)

    def _checked(self, answer: web.Response, fault: Fault | None, http: web.Request) -> web.StreamResponse:
        if fault is Fault.FORGOTTEN:
            del self._sessions[http.query["upload_id"]]
        return self._reset(http) if fault in (Fault.LOST, Fault.FORGOTTEN) else answer

    def _reset(self, http: web.Request) -> web.Response:
        assert http.transport is not None
        http.transport.abort()
        return web.Response()

    def _classify(self, http: web.Request) -> tuple[str, str]:
        """Return the kind of a request, and the part of its path that names what it is about."""
        path = http.rel_url.raw_path
        if "upload_id" in http.query:
            if http.method == "DELETE":
                return "cancel", path
            span = http.headers["Content-Range"]
            if span == "bytes */*":
                return "ask", path
            match = re.fullmatch(r"bytes (?:\*|\d+-(\d+))/(\d+)", span)
            if match is None:
                raise _No(400, f"bad Content-Range {span}")
            return ("last" if match[1] is None or int(match[1]) + 1 == int(match[2]) else "chunk"), path
        if path.startswith("/upload/"):
            return "begin", path.removeprefix("/upload/storage/v1/b/")
        if path.startswith("/download/"):
            return "read", path.removeprefix("/download/storage/v1/b/")
        rest = path.removeprefix("/storage/v1/b/")
        if rest.endswith("/o"):
            return "list", rest
        return {"GET": "describe", "DELETE": "delete"}[http.method], rest

    def _key(self, http: web.Request, rest: str) -> str:
        if "upload_id" in http.query:
            session = self._sessions.get(http.query["upload_id"])
            return session.key if session else ""
        if "name" in http.query:
            return http.query["name"]
        return _names(rest)[1]

    # -- objects

    def _bucket(self, name: str) -> dict[str, _Object]:
        if name not in self.objects:
            raise _No(404, "The specified bucket does not exist.", "notFound")
        return self.objects[name]

    def _find(self, http: web.Request, rest: str) -> tuple[str, str, _Object]:
        bucket, key = _names(rest)
        found = self._bucket(bucket).get(key)
        generation = http.query.get("generation")
        if found is None or generation not in (None, str(found.generation)):
            raise _No(404, f"No such object: {bucket}/{key}", "notFound")
        return bucket, key, found

    async def _describe(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, key, found = self._find(http, rest)
        return web.json_response(found.describe(bucket, key))

    async def _list(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, _key = _names(rest)
        keys = sorted(key for key in self._bucket(bucket) if key.startswith(http.query["prefix"]))
        after = http.query.get("pageToken", "")
        keys = [key for key in keys if key > after]
        page = keys[: min(self._page, int(http.query["maxResults"]))]
        body: dict[str, Any] = {"items": [{"name": key} for key in page]} if page else {}
        if len(page) < len(keys):
            body["nextPageToken"] = page[-1]
        return web.json_response(body)

    async def _delete(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, key, found = self._find(http, rest)
        if http.query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise _No(412, "conditionNotMet", "conditionNotMet")
        del self.objects[bucket][key]
        return web.Response(status=204)

    async def _read(self, http: web.Request, rest: str, fault: Fault | None) -> web.StreamResponse:
        _bucket, _key, found = self._find(http, rest)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", http.headers["Range"])
        assert match is not None
        start, stop = int(match[1]), min(int(match[2]) + 1, len(found.data))
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(found.data)}"}
        data = found.data[start:stop]
        if fault is not Fault.HALF:
            self.served += len(data)
            return web.Response(status=206, body=data, headers=headers)
        answer = web.StreamResponse(status=206, headers={**headers, "Content-Length": str(len(data))})
        await answer.prepare(http)
        data = data[: len(data) // 2]
        self.served += len(data)
        await answer.write(data)
        raise _Lost

    # -- uploads

    async def _begin(self, http: web.Request, rest: str, _: Fault | None) -> web.Response:
        bucket, _key = _names(rest)
        key = http.query["name"]
        while self._late:
            self._store(self._late.pop())
        self._match(bucket, key, http.query.get("ifGenerationMatch"))
        session = _Session(
            bucket=bucket,
            key=key,
            metadata=(await http.json()).get("metadata", {}),
            match=http.query.get("ifGenerationMatch"),
            total=int(http.headers["X-Upload-Content-Length"]),
        )
        number = f"session-{next(self._ids)}"
        self._sessions[number] = session
        location = f"{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        return web.Response(headers={"Location": location})

    async def _cancel(self, http: web.Request, _rest: str, _: Fault | None) -> web.Response:
        self._session(http)
        del self._sessions[http.query["upload_id"]]
        return web.Response(status=499)

    async def _ask(self, http: web.Request, _rest: str, _: Fault | None) -> web.Response:
        session = self._session(http)
        return web.json_response(session.done) if session.done is not None else _continue(session)

    async def _chunk(self, http: web.Request, _rest: str, fault: Fault | None) -> web.Response:
        session, data = await self._receive(http)
        if len(data) % ALIGNMENT:
            raise _No(400, "a chunk must be a multiple of 256 KiB")
        if fault in (Fault.HALF, Fault.SHORT):
            data = data[: len(data) // 2 // ALIGNMENT * ALIGNMENT]
        session.data += data
        if fault is Fault.HALF:
            raise _Lost
        return _continue(session)

    async def _last(self, http: web.Request, _rest: str, fault: Fault | None) -> web.Response:
        session, data = await self._receive(http)
        if fault is Fault.SHORT:
            return _continue(session)
        session.data += data
        if fault is Fault.DAMAGED:
            session.data[0] ^= 1
        if len(session.data) != session.total:
            raise _No(400, "not every byte was sent")
        hashed = http.headers["X-Goog-Hash"]
        if hashed != f"crc32c={as_text(crc32c([memoryview(session.data)]))}":
            del self._sessions[http.query["upload_id"]]
            raise _No(400, "Provided CRC32C doesn't match calculated CRC32C")
        self._match(session.bucket, session.key, session.match)
        if fault is Fault.CORRUPT:
            session.data[0] ^= 1
        if fault is Fault.LATE:
            self._late.append(self._sessions.pop(http.query["upload_id"]))
            raise _Lost
        self._store(session)
        return web.json_response(session.done)

    def _store(self, session: _Session) -> None:
        stored = _Object(bytes(session.data), next(self._ids), session.metadata)
        self.objects[session.bucket][session.key] = stored
        session.done = stored.describe(session.bucket, session.key)

    async def _receive(self, http: web.Request) -> tuple[_Session, bytes]:
        """Return the session and the bytes that are new to it."""
        session = self._session(http)
        data = await http.read()
        self.received += len(data)
        match = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\d+)", http.headers["Content-Range"])
        assert match is not None
        start = int(match[1]) if match[1] is not None else len(session.data)
        stop = int(match[2]) + 1 if match[2] is not None else start
        if session.done is not None or stop - start != len(data) or int(match[3]) != session.total:
            raise _No(400, "Content-Range and body do not go together")
        if start > len(session.data):
            raise _No(400, "bytes were left out")
        return session, data[len(session.data) - start :]

    def _session(self, http: web.Request) -> _Session:
        session = self._sessions.get(http.query["upload_id"])
        if session is None:
            raise _No(404, "no such session", "notFound")
        return session

    def _match(self, bucket: str, key: str, generation: str | None) -> None:
        found = self._bucket(bucket).get(key)
        if generation is not None and int(generation) != (found.generation if found else 0):
            raise _No(
                412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet"
            )


def _names(rest: str) -> tuple[str, str]:
    """Take ``BUCKET/o/OBJECT`` apart."""
    bucket, _, key = rest.partition("/o")
    return unquote(bucket), unquote(key.removeprefix("/"))


def _continue(session: _Session) -> web.Response:
    held = len(session.data)
    return web.Response(status=308, headers={"Range": f"bytes=0-{held - 1}"} if held else {})


# -- a store that uses it

Test = Callable[[GCSStore, Location], Awaitable[None]]


def at(kind: str, number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Return what makes *fault* befall one request."""
    return lambda request: fault if (request.kind, request.number) == (kind, number) else None


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


async def put_all(upload: ResumableUpload, content: Content, retry: RetryPolicy = QUICK) -> None:
    """Put every part as a writer does, again after transient errors."""
    for part in cut(content.nbytes, upload.part_size):
        await call_with_retry(retry, upload.put, part, content)


async def save(store: GCSStore, location: Location, data: bytes) -> None:
    """Save as a writer does."""
    upload = await store.begin(location, len(data))
    try:
        await put_all(upload, BytesContent(data))
        await upload.commit([])
    except BaseException:
        with anyio.CancelScope(shield=True):
            await upload.abort()
        raise
