"""The fault proxy: what each fault does to a client and to the server behind it, and that nothing else changes."""

from __future__ import annotations

import http.client
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

from stress.httpfaults import SLOW_DOWN, AnswerEnd, response
from stress.proxy import FaultProxy, Faults
from tests.support import PATIENCE_SECONDS

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it receives."""

    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except ConnectionError:  # what the proxy is for
            pass


class Web(BaseHTTPRequestHandler):
    """Answers every request with its own method, target and length of body, and remembers them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: list[tuple[str, str, int]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.seen.append((self.command, self.path, len(body)))
        text = f"{self.command} {self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_PUT

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[str]:
    """Run *server* on a thread for the time of a block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield "http://{}:{}".format(*server.server_address[:2])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it receives."""
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)) as url:
        yield url


@pytest.fixture
def web() -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
    """A web server, and the requests that it has got."""
    seen: list[tuple[str, str, int]] = []
    handler = type("SeeingWeb", (Web,), {"seen": seen})
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield url, seen


def connect(proxy: FaultProxy) -> socket.socket:
    """Connect to *proxy*."""
    parts = urlsplit(proxy.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=PATIENCE_SECONDS)


def receive(client: socket.socket, count: int) -> bytes:
    """Return the next *count* bytes, or those before the end."""
    data = b""
    while len(data) < count:
        piece = client.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data


def connect_and_receive(proxy: FaultProxy) -> bytes:
    """Connect to *proxy* and return the first byte; a reset may come at either step."""
    with connect(proxy) as client:
        return client.recv(1)


def round_trip(client: socket.socket, data: bytes) -> bytes:
    """Send *data* and return what comes back, reading meanwhile, for neither side's buffers hold all of it."""
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    try:
        return receive(client, len(data))
    finally:
        sender.join()


@contextmanager
def client_of(proxy: FaultProxy) -> Iterator[Callable[..., tuple[int, bytes]]]:
    """One kept-alive HTTP connection: a function of method, target and body that returns status and body."""
    parts = urlsplit(proxy.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE_SECONDS)

    def ask(method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    try:
        yield ask
    finally:
        connection.close()


def test_bytes_pass_unchanged_and_are_counted(echo: str) -> None:
    """Without faults the proxy changes nothing, hands the client's end on, and counts."""
    with FaultProxy(echo) as proxy, connect(proxy) as client:
        assert round_trip(client, PAYLOAD) == PAYLOAD
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""

        assert (proxy.connections, proxy.bytes_up, proxy.bytes_down) == (1, len(PAYLOAD), len(PAYLOAD))


def test_latency_delays_each_way(echo: str) -> None:
    """A latency of 50 ms makes an answer 100 ms late."""
    with FaultProxy(echo, faults=Faults(latency_seconds=0.05)) as proxy, connect(proxy) as client:
        begun = monotonic()

        assert round_trip(client, b"x") == b"x"
        assert monotonic() - begun >= 0.1


def test_latency_does_not_narrow(echo: str) -> None:
    """Latency delays a stream once, not every piece of it."""
    with FaultProxy(echo, faults=Faults(latency_seconds=0.2)) as proxy, connect(proxy) as client:
        begun = monotonic()

        assert round_trip(client, PAYLOAD) == PAYLOAD
        assert 0.4 <= monotonic() - begun < 3.2  # by the piece it would be at least that


def test_rate_narrows_a_connection(echo: str) -> None:
    """1 MiB takes 0.2 s at 5 MiB a second."""
    with FaultProxy(echo) as proxy, connect(proxy) as client:
        proxy.set(rate=5 * len(PAYLOAD))
        begun = monotonic()

        assert round_trip(client, PAYLOAD) == PAYLOAD
        assert monotonic() - begun >= 0.2 - 0.06  # less what a late timer may catch up


def test_faults_change_under_way(echo: str) -> None:
    """Bytes stay in order when the latency is taken away while some are on their way."""
    with FaultProxy(echo, faults=Faults(latency_seconds=0.2)) as proxy, connect(proxy) as client:
        client.sendall(b"first")
        proxy.clear()
        client.sendall(b"second")

        assert receive(client, 11) == b"firstsecond"


def test_reset_after_some_bytes(echo: str) -> None:
    """A connection is reset once so many bytes have passed it, and a new one starts anew."""
    with FaultProxy(echo, faults=Faults(reset_after=1000)) as proxy:
        for _ in range(2):
            with connect(proxy) as client:
                client.sendall(bytes(1500))
                with pytest.raises(ConnectionResetError):
                    receive(client, 1500)


def test_stall_after_some_bytes(echo: str) -> None:
    """A stalled connection passes nothing more, though open, until the fault is taken away."""
    with FaultProxy(echo, faults=Faults(stall_after=10)) as proxy, connect(proxy) as client:
        client.sendall(b"0123456789")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(PATIENCE_SECONDS)
        proxy.set(stall_after=None)

        assert receive(client, 10) == b"0123456789"


def test_refusal_resets_old_and_new_connections(echo: str) -> None:
    """A proxy that refuses resets the connections there are and those to come, until it no longer does."""
    with FaultProxy(echo) as proxy:
        with connect(proxy) as client:
            round_trip(client, b"x")
            proxy.set(refuse=True)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with pytest.raises(ConnectionResetError):
            connect_and_receive(proxy)
        proxy.clear()
        with connect(proxy) as client:
            assert round_trip(client, b"x") == b"x"


def test_a_server_that_is_gone() -> None:
    """Where no server listens behind the proxy, a client's connection is reset."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{unused.getsockname()[1]}") as proxy:
            with pytest.raises(ConnectionResetError):
                connect_and_receive(proxy)


def test_requests_are_answered_instead_of_the_server(web: tuple[str, list[Any]]) -> None:
    """A request that the hook answers never reaches the server; others do, on the same connection."""
    url, seen = web
    asked: list[tuple[str, str, Mapping[str, str]]] = []

    def answer(method: str, target: str, headers: Mapping[str, str]) -> bytes | None:
        asked.append((method, target, headers))
        return SLOW_DOWN if target == "/busy" else None

    with FaultProxy(url, answer=answer) as proxy, client_of(proxy) as ask:
        assert ask("PUT", "/one", b"12345") == (200, b"PUT /one 5")
        status, body = ask("PUT", "/busy", PAYLOAD)
        assert (status, b"<Code>SlowDown</Code>" in body) == (503, True)
        assert ask("GET", "/two", Name="value") == (200, b"GET /two 0")

        assert proxy.connections == 1
    assert seen == [("PUT", "/one", 5), ("GET", "/two", 0)]
    assert [(method, target) for method, target, _ in asked] == [
        ("PUT", "/one"),
        ("PUT", "/busy"),
        ("GET", "/two"),
    ]
    assert asked[2][2]["name"] == "value"


@pytest.mark.parametrize("sends_body", [True, False])
def test_an_answer_to_a_client_that_waits(web: tuple[str, list[Any]], sends_body: bool) -> None:
    """A client that waits for leave to send its body gets the answer and then the connection's end."""
    with FaultProxy(web[0], answer=lambda *_: response(503, b"no")) as proxy, connect(proxy) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        if sends_body:
            client.sendall(b"12345")

        assert receive(client, 1000) == response(503, b"no")


def test_leave_to_send_comes_from_the_server(web: tuple[str, list[Any]]) -> None:
    """A forwarded request that waits for leave gets it from the server, and then its answer."""
    with FaultProxy(web[0], answer=lambda *_: None) as proxy, connect(proxy) as client:
        client.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        leave = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert receive(client, len(leave)) == leave
        client.sendall(b"12345")

        assert receive(client, 15) == b"HTTP/1.1 200 OK"


def test_chunked_bodies_are_refused(web: tuple[str, list[Any]]) -> None:
    """A body of untold length is answered 501, since its end would not be found."""
    with FaultProxy(web[0], answer=lambda *_: None) as proxy, connect(proxy) as client:
        client.sendall(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n\r\n")

        assert receive(client, 1000) == response(501)
    assert web[1] == []


@pytest.mark.parametrize("faults", [Faults(), Faults(latency_seconds=0.05)])
@pytest.mark.parametrize(("method", "body"), [("PUT", PAYLOAD), ("POST", b""), ("HEAD", b"")])
def test_an_answer_is_lost(web: tuple[str, list[Any]], method: str, body: bytes, faults: Faults) -> None:
    """A request whose answer is lost is carried out, and its client's connection is reset."""
    url, seen = web
    with FaultProxy(url, lose_answer=lambda _, target: target == "/commit", faults=faults) as proxy:
        with client_of(proxy) as ask:
            assert ask("PUT", "/before", b"x") == (200, b"PUT /before 1")
            with pytest.raises(ConnectionResetError):
                ask(method, "/commit", body)
        with client_of(proxy) as ask:
            assert ask("PUT", "/after", b"x") == (200, b"PUT /after 1")

    assert seen == [("PUT", "/before", 1), (method, "/commit", len(body)), ("PUT", "/after", 1)]


def test_a_lost_answer_keeps_the_leave_to_send(web: tuple[str, list[Any]]) -> None:
    """Leave to send a body is no answer: it passes, and what comes after the body is lost."""
    with FaultProxy(web[0], lose_answer=lambda *_: True) as proxy, connect(proxy) as client:
        client.sendall(b"PUT /x HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        leave = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert receive(client, len(leave)) == leave
        client.sendall(b"12345")
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    assert web[1] == [("PUT", "/x", 5)]


def test_a_hook_that_fails_is_heard_of(web: tuple[str, list[Any]]) -> None:
    """What a hook raises resets its client and is raised when the proxy's context is left."""

    def answer(*_: object) -> bytes | None:
        raise LookupError("no such answer")

    def use() -> None:
        with FaultProxy(web[0], answer=answer) as proxy, client_of(proxy) as ask:
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                ask("GET", "/")

    with pytest.raises(ExceptionGroup) as raised:
        use()

    error: BaseException = raised.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert str(error) == "no such answer"


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("PUT", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"),
        ("PUT", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("PUT", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"),
        ("POST", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
        ("POST", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"),
        ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_end_of_an_answer_is_found(method: str, answer: bytes, step: int) -> None:
    """However an answer tells its length, and however it is cut, it is complete at its last byte and not before."""
    end = AnswerEnd(method)

    said = [end.feed(answer[at : at + step]) for at in range(0, len(answer), step)]

    assert said == [False] * (len(said) - 1) + [True]
