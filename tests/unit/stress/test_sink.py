"""The discarding sink: that it takes what an S3 client sends, and counts it."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from stress import sink
from stress.servers.process import Server

pytestmark = pytest.mark.integration

MIB = 1 << 20
TIMEOUT_SECONDS = 20.0


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    """A sink for all tests."""
    with sink.start() as server:
        yield server


@pytest.fixture
def client(served: Server) -> Iterator[http.client.HTTPConnection]:
    """A connection to it."""
    parts = urlsplit(served.url)
    with closing(
        http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_SECONDS)
    ) as made:
        yield made


def ask(
    client: http.client.HTTPConnection, method: str, target: str, body: bytes = b"", **headers: str
) -> tuple[int, str, str]:
    """Return the status, the ETag and the body of an answer."""
    client.request(method, target, body, headers)
    answer = client.getresponse()
    return answer.status, answer.headers.get("ETag", ""), answer.read().decode()


def test_a_multipart_upload(client: http.client.HTTPConnection) -> None:
    """Parts in any order become one object of their total size, on one connection."""
    status, _, text = ask(client, "POST", "/bucket/some/key?uploads")
    found = re.search("<UploadId>(.+)</UploadId>", text)
    assert status == 200
    assert found is not None
    for number, size in (2, 3 * MIB), (1, 5 * MIB):
        status, etag, _ = ask(
            client, "PUT", f"/bucket/some/key?partNumber={number}&uploadId={found[1]}", bytes(size)
        )
        assert (status, bool(etag)) == (200, True)
    assert ask(client, "HEAD", "/bucket/some/key")[0] == 404
    assert ask(client, "POST", f"/bucket/some/key?uploadId={found[1]}", b"<x/>")[0] == 200

    client.request("HEAD", "/bucket/some/key")
    head = client.getresponse()
    head.read()
    assert (head.status, head.headers["Content-Length"]) == (200, str(8 * MIB))


def test_an_aborted_upload_is_gone(client: http.client.HTTPConnection) -> None:
    """An upload is aborted once, then no part of it is taken."""
    _, _, text = ask(client, "POST", "/bucket/gone?uploads")
    upload = text.partition("<UploadId>")[2].partition("<")[0]

    assert ask(client, "DELETE", f"/bucket/gone?uploadId={upload}")[0] == 204
    for method, target in ("DELETE", ""), ("PUT", "partNumber=1&"), ("POST", ""):
        status, _, text = ask(client, method, f"/bucket/gone?{target}uploadId={upload}")
        assert (status, "NoSuchUpload" in text) == (404, True)


def test_lists_are_empty(client: http.client.HTTPConnection) -> None:
    """A bucket has no unfinished uploads and nothing in it to list."""
    assert "<ListMultipartUploadsResult>" in ask(client, "GET", "/bucket?uploads")[2]
    assert "<KeyCount>0</KeyCount>" in ask(client, "GET", "/bucket?list-type=2&prefix=x")[2]


def test_bodies_are_counted(client: http.client.HTTPConnection, served: Server) -> None:
    """The totals tell requests, bytes and the sink's own CPU time; an object's checksum is taken as verified."""
    before = sink.totals(served.url)
    client.request("PUT", "/bucket/key", bytes(7 * MIB), {"x-amz-checksum-crc32c": "AAAAAA=="})
    answer = client.getresponse()
    answer.read()
    after = sink.totals(served.url)

    assert answer.headers["x-amz-checksum-crc32c"] == "AAAAAA=="
    assert (after.requests - before.requests, after.body_bytes - before.body_bytes) == (1, 7 * MIB)
    assert after.cpu_seconds >= before.cpu_seconds


def test_leave_to_send(client: http.client.HTTPConnection) -> None:
    """A client that waits for leave to send its body gets it."""
    client.putrequest("PUT", "/bucket/key")
    client.putheader("Expect", "100-continue")
    client.putheader("Content-Length", "5")
    client.endheaders()
    assert client.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"12345")

    assert client.getresponse().status == 200


def test_chunked_bodies_are_refused(client: http.client.HTTPConnection) -> None:
    """A body of untold length is answered 501: a benchmark that sends such bodies would be absurdly fast."""
    client.request("PUT", "/bucket/key", iter([b"12345"]), encode_chunked=True)

    assert client.getresponse().status == 501
