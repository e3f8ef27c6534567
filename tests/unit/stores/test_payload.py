"""The body of an upload request."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.stores.payload import PartPayload

SLICE = 256 << 10


class Writer:
    """A connection that takes everything, and notes it."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    async def write(self, data: bytes | memoryview) -> None:
        self.taken.append(bytes(data))


def views(*pieces: bytes) -> list[memoryview]:
    """Return views of *pieces*."""
    return [memoryview(piece) for piece in pieces]


def sent(payload: PartPayload, length: int | None = None) -> list[bytes]:
    """Return what *payload* gives to a connection."""
    writer: Any = Writer()
    asyncio.run(payload.write_with_length(writer, length))
    taken: list[bytes] = writer.taken
    return taken


@given(sizes=st.lists(st.integers(0, 3 * SLICE), max_size=6))
def test_all_bytes_in_slices(sizes: Sequence[int]) -> None:
    """Whatever the pieces, all bytes are sent, in order, in slices of a bounded length."""
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    payload = PartPayload(views(*pieces))
    taken = sent(payload)
    assert b"".join(taken) == b"".join(pieces)
    assert all(0 < len(each) <= SLICE for each in taken)
    assert len(payload) == sum(sizes) == payload.size


def test_small_neighbours_go_together() -> None:
    """Many small pieces are sent by few writes."""
    payload = PartPayload(views(*[b"x" * 100] * 2_500))
    assert len(sent(payload)) == 1


def test_sending_starts_anew() -> None:
    """A payload is sent whole each time, whatever was read or sent before."""
    payload = PartPayload(views(b"abc", b"def"))
    payload.read(4)
    assert sent(payload) == sent(payload) == [b"abcdef"]
    assert sent(payload, 2) == [b"ab"]


def test_progress_is_told() -> None:
    """Each slice that the connection has taken is told."""
    told: list[None] = []
    payload = PartPayload(views(b"x" * SLICE * 3), moved=lambda: told.append(None))
    sent(payload)
    assert len(told) == 3


@given(
    data=st.binary(max_size=50), cut=st.integers(0, 50), start=st.integers(0, 60), size=st.integers(-1, 60)
)
def test_reads_like_a_file(data: bytes, cut: int, start: int, size: int) -> None:
    """It reads and seeks as a file of its bytes does, as far as its end."""
    payload, file = PartPayload(views(data[:cut], data[cut:])), io.BytesIO(data)
    assert payload.seek(0, io.SEEK_END) == len(data)
    payload.seek(start)
    file.seek(min(start, len(data)))
    assert payload.read(size) == file.read(size)
    assert payload.tell() == file.tell()
    assert payload.seek(-1, io.SEEK_CUR) == max(0, file.tell() - 1)


def test_an_empty_body_is_a_body() -> None:
    """Nothing to send is something all the same."""
    assert PartPayload([])
    assert len(PartPayload([])) == 0
    assert sent(PartPayload([])) == []


def test_no_text() -> None:
    """It refuses to be decoded."""
    with pytest.raises(TypeError):
        PartPayload([]).decode()


def test_through_aiohttp() -> None:
    """It goes through aiohttp with its length, and again when it is redirected."""
    data = [b"x" * 700_000, b"y", b"z" * 300_000]
    seen: list[tuple[int | None, bytes]] = []

    async def take(request: web.Request) -> web.Response:
        seen.append((request.content_length, await request.read()))
        if len(seen) == 1:
            raise web.HTTPTemporaryRedirect("/again")
        return web.Response()

    async def run() -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_put("/{name}", take)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{port}/first"
                async with session.put(url, data=PartPayload(views(*data))) as answer:
                    assert answer.status == 200
        finally:
            await runner.cleanup()

    anyio.run(run)
    assert seen == [(len(b"".join(data)), b"".join(data))] * 2
