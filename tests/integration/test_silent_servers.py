"""Loads from servers that accept and never answer, or that send a byte now and then: nobody waits for them for long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from async_ckpt import CheckpointService, ServiceClosedError
from tests.support import PATIENCE_SECONDS, python

pytestmark = pytest.mark.integration

#: Anything that waits for such a server waits for half a minute at least; this is for a slow machine.
SOON_SECONDS = 10.0
HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\nETag: "a"\r\n\r\n'
PACKAGES = {
    "http": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "abfs": "adlfs",
    "ftp": "fsspec",
    "sftp": "paramiko",
}


@contextmanager
def silent(*, trickles: bool) -> Iterator[tuple[int, threading.Event]]:
    """Run a server; yield its port, and what is set once somebody has come."""
    came, over = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def talk(line: socket.socket) -> None:
        with line, suppress(OSError):
            came.set()
            if trickles:
                line.recv(65536)
                line.sendall(HEAD)
            while not over.wait(0.1):
                if trickles:
                    line.sendall(b"x")

    def serve() -> None:
        with suppress(OSError):
            while True:
                line, _ = listening.accept()
                threads.append(threading.Thread(target=talk, args=(line,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield listening.getsockname()[1], came
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)
            serving.join()
            for thread in threads:
                thread.join()


def place(kind: str, port: int) -> tuple[str, dict[str, Any] | None]:
    """Return a URL at the server, and the options for it."""
    server = f"http://127.0.0.1:{port}"
    account = f"DefaultEndpointsProtocol=http;AccountName=a;AccountKey=YQ==;BlobEndpoint={server}/a;"
    places: dict[str, tuple[str, dict[str, Any] | None]] = {
        "http": (f"{server}/x.ckpt", None),
        "s3": ("s3://b/x.ckpt", {"key": "a", "secret": "b", "endpoint_url": server}),
        "gs": ("gs://b/x.ckpt", {"token": "anon", "endpoint_url": server}),
        "abfs": ("abfs://c/x.ckpt", {"connection_string": account}),
        "ftp": (f"ftp://127.0.0.1:{port}/x.ckpt", None),
        "sftp": (f"sftp://u:p@127.0.0.1:{port}/x.ckpt", None),
    }
    return places[kind]


@pytest.mark.parametrize(
    ("kind", "trickles"),
    [
        (kind, trickles)
        for kind in PACKAGES
        for trickles in (False, True)
        if kind[-2:] != "tp" or not trickles
    ],
)
def test_close_leaves_a_silent_server(kind: str, trickles: bool) -> None:
    """Close ends a load from a server of any kind that does not answer, and returns soon (B2)."""
    pytest.importorskip(PACKAGES[kind])
    errors: list[BaseException] = []
    with silent(trickles=trickles) as (port, came):
        url, options = place(kind, port)
        service = CheckpointService(storage_options=options)

        def load() -> None:
            try:
                service.load(url, progress=False)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        assert came.wait(PATIENCE_SECONDS)
        began = monotonic()
        service.close(timeout=1)
        assert monotonic() - began < SOON_SECONDS
        thread.join(PATIENCE_SECONDS)
        assert [type(error) for error in errors] == [ServiceClosedError]
    for left in threading.enumerate():  # the server has hung up, and so it ends
        if left.name.startswith("async_ckpt"):
            left.join(PATIENCE_SECONDS)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_the_exit_leaves_a_silent_server(kind: str, tmp_path: Path) -> None:
    """A program ends, with its own exit code, though a thread of it loads from a server that does not answer (D4)."""
    pytest.importorskip(PACKAGES[kind])
    with silent(trickles=False) as (port, came):
        url, options = place(kind, port)

        def tell() -> None:
            if came.wait(PATIENCE_SECONDS):
                (tmp_path / "came").touch()

        telling = threading.Thread(target=tell)
        telling.start()
        done = python(
            f"""
            import os, sys, threading
            from async_ckpt import CheckpointService, ServiceClosedError

            service = CheckpointService(storage_options={options!r})
            def load():
                try:
                    service.load({url!r}, progress=False)
                except ServiceClosedError:
                    print("told", flush=True)
            threading.Thread(target=load).start()
            while not os.path.exists({str(tmp_path / "came")!r}):
                pass
            sys.exit(7)
            """
        )
        telling.join()
    assert (done.returncode, done.stdout) == (7, "told\n"), done.stderr
