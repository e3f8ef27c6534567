"""HTTP/1.1 as far as a proxy needs it that answers, or loses the answer of, single requests.

Understands requests with and without ``Content-Length`` and with ``Expect: 100-continue``; chunked requests it
refuses with 501, for none of our stores sends any. Where bytes go, and when, is ``stress.proxy``'s.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

__all__ = [
    "SLOW_DOWN",
    "Answer",
    "AnswerEnd",
    "Channel",
    "LoseAnswer",
    "Request",
    "forward_requests",
    "response",
]

#: Of a request's method, target and headers (names in lower case): a whole answer, or None to forward it.
Answer = Callable[[str, str, Mapping[str, str]], "bytes | None"]
#: Of a request's method and target: whether the server carries it out but the client never hears of it.
LoseAnswer = Callable[[str, str], bool]

MAX_HEAD_BYTES = 64 * 1024
_END = b"\r\n\r\n"


def response(status: int, body: bytes = b"", *, headers: Mapping[str, str] | None = None) -> bytes:
    """Return an HTTP answer, for an `Answer` to give."""
    named = {"Content-Length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in named.items())]
    return "\r\n".join(lines).encode("latin-1") + _END + body


#: What S3 says to a client that asks too often.
SLOW_DOWN = response(
    503,
    b"<?xml version='1.0' encoding='UTF-8'?>"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    headers={"Content-Type": "application/xml"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The head of a request."""

    method: str
    target: str
    headers: Mapping[str, str]

    @classmethod
    def parse(cls, head: bytes) -> Request:
        """Read a head that ends with an empty line."""
        first, headers = _parse(head)
        method, target, _ = first.split(" ", 2)
        return cls(method=method, target=target, headers=headers)

    @property
    def length(self) -> int:
        """How many bytes of body follow."""
        return int(self.headers.get("content-length", "0"))

    @property
    def waits(self) -> bool:
        """Whether the body is sent only when the server says so."""
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def chunked(self) -> bool:
        """Whether the body's length is not told beforehand."""
        return "transfer-encoding" in self.headers


class Channel(Protocol):
    """What a connection of the proxy offers."""

    async def receive(self) -> bytes:
        """Return the client's next bytes, or none at their end."""

    async def send_up(self, data: bytes) -> None:
        """Send to the server."""

    async def send_down(self, data: bytes) -> None:
        """Send to the client."""

    async def finish(self) -> None:
        """End what is sent to the client, and wait until it ends too."""

    def lose_next_answer(self, method: str) -> None:
        """Let the server's next answer be lost, and then the connection."""


async def forward_requests(channel: Channel, answer: Answer | None, lose_answer: LoseAnswer | None) -> None:
    """Forward a client's requests, less those that are answered here, until it closes."""
    rest = b""
    while True:
        head, rest = await _read_head(channel, rest)
        if not head:
            return
        request = Request.parse(head)
        own = answer(request.method, request.target, request.headers) if answer else None
        if request.chunked:
            own = response(501)
        if own is not None and (request.waits or request.chunked):
            # Whether the body follows is for the client to choose, so this connection cannot be used again.
            await channel.send_down(own)
            await channel.finish()
            return
        if own is not None:
            rest = await _body(channel, request, rest, _discard)
            await channel.send_down(own)
            continue
        losing = lose_answer is not None and lose_answer(request.method, request.target)

        async def send(data: bytes, last: bool, losing: bool = losing, method: str = request.method) -> None:
            # Not before the body's last piece: till then the server may say only that it wants the body.
            if losing and last:
                channel.lose_next_answer(method)
            await channel.send_up(data)

        await send(head, request.length == 0)
        rest = await _body(channel, request, rest, send)


async def _read_head(channel: Channel, rest: bytes) -> tuple[bytes, bytes]:
    """Return a request's head and what came after it, or nothing at the end."""
    while _END not in rest:
        data = await channel.receive()
        if not data:
            return b"", b""
        rest += data
        if len(rest) > MAX_HEAD_BYTES and _END not in rest:
            raise ValueError(f"a request's head is longer than {MAX_HEAD_BYTES} bytes")
    end = rest.index(_END) + len(_END)
    return rest[:end], rest[end:]


async def _body(
    channel: Channel, request: Request, rest: bytes, send: Callable[[bytes, bool], Awaitable[None]]
) -> bytes:
    """Hand on a request's body, telling which piece is the last; return what came after it."""
    left = request.length
    while left:
        data = rest or await channel.receive()
        if not data:
            return b""
        piece, rest = data[:left], data[left:]
        left -= len(piece)
        await send(piece, left == 0)
    return rest


async def _discard(data: bytes, last: bool) -> None:
    """Hand on to nobody."""


class AnswerEnd:
    """Finds the end of an answer that nobody is told of: only then has the server surely done what was asked."""

    def __init__(self, method: str) -> None:
        self._bodiless = method == "HEAD"
        self._received = b""
        self._left: int | None = None
        self._chunked = False

    def feed(self, data: bytes) -> bool:
        """Take what the server sent; return whether the answer is complete."""
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        self._received = (self._received + data)[-MAX_HEAD_BYTES:]
        if self._chunked:
            return self._received.endswith(b"\r\n0" + _END)
        while _END in self._received:
            head, self._received = self._received.split(_END, 1)
            first, headers = _parse(head)
            status = int(first.split(" ", 2)[1])
            if status < HTTPStatus.OK:
                continue
            if self._bodiless or status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
                return True
            if headers.get("transfer-encoding", "").lower() == "chunked":
                self._chunked, self._received = True, b"\r\n" + self._received
                return self._received.endswith(b"\r\n0" + _END)
            if "content-length" in headers:
                self._left = int(headers["content-length"]) - len(self._received)
                return self._left <= 0
            self._left = 1 << 62  # till the server closes
            return False
        return False


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return first, {name.strip().lower(): value.strip() for name, value in pairs}
