"""The strict server: serves the interface, and lets happen to each request what a test wants."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from aiohttp import web
from anyio.from_thread import BlockingPortal, start_blocking_portal

from tests.strict_gcs.faults import Fault, Request
from tests.strict_gcs.interface import Interface
from tests.strict_gcs.objects import Lost, No, names

__all__ = ["StrictGCS"]

HOST = "127.0.0.1"


class StrictGCS(Interface):
    """A context manager; inside, the server answers at ``url``, on a thread of its own.

    Args:
        fault: asked of every request, on the server's thread.
        page: objects that a listing names at a time.

    Attributes:
        requests: what came, in order.
    """

    def __init__(self, fault: Callable[[Request], Fault | None] = lambda _: None, *, page: int = 3) -> None:
        super().__init__(page=page)
        self.fault = fault
        self.requests: list[Request] = []
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
                raise No(503, "Backend unavailable", "backendError")
            if fault is Fault.DENIED:
                raise No(403, "Caller has no access", "forbidden")
            if fault is Fault.GONE:
                del self._sessions[http.query["upload_id"]]
                raise No(410, "The session is gone")
            if fault is Fault.FOREIGN:
                return web.Response(text="<html>Please log in</html>", content_type="text/html")
            if fault is Fault.REDIRECTED:
                return web.Response(status=308, headers={"Location": "https://elsewhere.invalid/"})
            return self._checked(await getattr(self, f"_{kind}")(http, rest, fault), fault, http)
        except No as no:
            return web.Response(status=no.status, text=no.text, content_type="application/json")
        except Lost:
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
                raise No(400, f"bad Content-Range {span}")
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
        return names(rest)[1]
