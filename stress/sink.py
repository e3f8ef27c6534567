"""A discarding sink that talks S3: no storage, no authentication, to measure what a client costs.

``python -m stress.sink`` prints the port it listens on; ``start`` runs it as a process for the time of a block.
It reads bodies into one buffer and counts them, remembers of each object its size alone, and believes every part
and every checksum. Never quote what it takes a second as the speed of an S3 server. Not spoken: chunked bodies
(501), downloads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from stress.httpfaults import Request, response
from stress.servers.process import HOST, Server, StartedServer, run_server
from stress.servers.s3 import describe

__all__ = ["Totals", "start", "totals"]

BUFFER_BYTES = 1 << 20
TOTALS_PATH = "/.totals"
CALL_SECONDS = 10.0
_ETAG = f'"{0:032x}"'
_END = b"\r\n\r\n"
_XML = "<?xml version='1.0' encoding='UTF-8'?>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a sink has taken since it started.

    Attributes:
        requests: All of them but those for the totals.
        body_bytes: Of all requests' bodies.
        cpu_seconds: What that cost the sink.
    """

    requests: int
    body_bytes: int
    cpu_seconds: float


@contextmanager
def start() -> Iterator[Server]:
    """Run a sink for the time of a block, in a process of its own; buckets need not be made."""

    def command(ports: tuple[int, ...], _: Path) -> list[str]:
        # By its path it would not find its siblings, and its working directory is not ours.
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from stress import sink"
        return [sys.executable, "-c", f"{code}; sink.main(['--port', '{ports[0]}'])"]

    def check(started: StartedServer) -> None:
        totals(started.url)

    with run_server(command, ports=1, check=check) as started:
        yield describe(started)


def totals(url: str) -> Totals:
    """Ask the sink at *url* what it has taken."""
    with urllib.request.urlopen(url + TOTALS_PATH, timeout=CALL_SECONDS) as answer:
        return Totals(**json.load(answer))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A discarding sink that talks S3; prints its port.")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(arguments)
    asyncio.run(_serve(options.port))


async def _serve(port: int) -> None:
    objects = Objects()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(objects), HOST, port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Objects:
    """The sizes of objects and of unfinished uploads, and how each request is answered."""

    def __init__(self) -> None:
        self.requests = 0
        self.body_bytes = 0
        self._sizes: dict[str, int] = {}
        self._uploads: dict[str, dict[str, int]] = {}
        self._made = 0

    def answer(self, request: Request) -> bytes:
        """Return the answer to a request whose body has arrived."""
        parts = urlsplit(request.target)
        if parts.path == TOTALS_PATH:
            return response(200, json.dumps(self._totals()).encode())
        self.requests += 1
        self.body_bytes += request.length
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        known: dict[str, Callable[[str, dict[str, str], Request], bytes]] = {
            "PUT": self._put,
            "POST": self._post,
            "HEAD": self._head,
            "GET": self._get,
            "DELETE": self._delete,
        }
        return known.get(request.method, _refuse)(parts.path, query, request)

    def _totals(self) -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_seconds = used.ru_utime + used.ru_stime
        return {"requests": self.requests, "body_bytes": self.body_bytes, "cpu_seconds": cpu_seconds}

    def _put(self, path: str, query: dict[str, str], request: Request) -> bytes:
        if "uploadId" in query:
            upload = self._uploads.get(query["uploadId"])
            if upload is None:
                return _error(404, "NoSuchUpload")
            upload[query.get("partNumber", "1")] = request.length
        else:
            self._sizes[path] = request.length
        # S3 says which checksum it has verified.
        verified = {k: v for k, v in request.headers.items() if re.match("x-amz-checksum-(?!algo|type)", k)}
        return response(200, headers={"ETag": _ETAG, **verified})

    def _post(self, path: str, query: dict[str, str], request: Request) -> bytes:
        bucket, _, key = path[1:].partition("/")
        if "uploads" in query:
            self._made += 1
            upload_id = f"upload-{self._made}"
            self._uploads[upload_id] = {}
            named = f"<Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{upload_id}</UploadId>"
            return _xml("InitiateMultipartUploadResult", named)
        if "uploadId" in query:
            upload = self._uploads.pop(query["uploadId"], None)
            if upload is None:
                return _error(404, "NoSuchUpload")
            self._sizes[path] = sum(upload.values())
            named = f"<Bucket>{bucket}</Bucket><Key>{key}</Key><ETag>{_ETAG}</ETag>"
            return _xml("CompleteMultipartUploadResult", named)
        return _xml("DeleteResult", "") if "delete" in query else _refuse(path, query, request)

    def _head(self, path: str, query: dict[str, str], request: Request) -> bytes:
        if "/" not in path[1:]:
            return response(200)
        size = self._sizes.get(path)
        if size is None:
            return response(404)
        modified = "Thu, 01 Jan 1970 00:00:00 GMT"
        return response(200, headers={"Content-Length": str(size), "ETag": _ETAG, "Last-Modified": modified})

    def _get(self, path: str, query: dict[str, str], request: Request) -> bytes:
        bucket = path.strip("/")
        if "uploads" in query:
            return _xml(
                "ListMultipartUploadsResult", f"<Bucket>{bucket}</Bucket><IsTruncated>false</IsTruncated>"
            )
        if "/" not in bucket:
            name = f"<Name>{bucket}</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>"
            return _xml("ListBucketResult", name)
        return _refuse(path, query, request)

    def _delete(self, path: str, query: dict[str, str], request: Request) -> bytes:
        if "uploadId" in query:
            found = self._uploads.pop(query["uploadId"], None) is not None
            return response(204) if found else _error(404, "NoSuchUpload")
        self._sizes.pop(path, None)
        return response(204)


class Connection(asyncio.BufferedProtocol):
    """One client. All connections share one buffer: what is read is done with before the next read."""

    _buffer = bytearray(BUFFER_BYTES)
    _view = memoryview(_buffer)

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._head = b""
        self._request: Request | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Discard the body's bytes, and read heads."""
        if self._request is not None and nbytes < self._left:  # nearly always: the midst of a body
            self._left -= nbytes
            return
        self._take(bytes(self._view[:nbytes]))

    def _take(self, data: bytes) -> None:
        while data:
            if self._request is None:
                head, end, rest = (self._head + data).partition(_END)
                if not end:
                    self._head = head
                    return
                self._head, data = b"", rest
                self._begin(Request.parse(head + end))
            else:
                step = min(self._left, len(data))
                self._left -= step
                data = data[step:]
            if self._request is not None and not self._left:
                request, self._request = self._request, None
                self._transport.write(self._objects.answer(request))

    def _begin(self, request: Request) -> None:
        self._request, self._left = request, request.length
        if request.chunked:
            self._transport.write(_error(501, "NotImplemented", Connection="close"))
            self._left = sys.maxsize  # till the client closes: closing first would hide the answer from it
        if request.waits:
            self._transport.write(b"HTTP/1.1 100 Continue" + _END)


def _refuse(path: str, query: dict[str, str], request: Request) -> bytes:
    return _error(501, "NotImplemented")


def _error(status: int, code: str, **headers: str) -> bytes:
    return response(status, f"{_XML}<Error><Code>{code}</Code></Error>".encode(), headers=headers)


def _xml(name: str, inside: str) -> bytes:
    return response(
        200, f"{_XML}<{name}>{inside}</{name}>".encode(), headers={"Content-Type": "application/xml"}
    )


if __name__ == "__main__":
    main()
