"""One connection through a bad network: what is late, narrow, cut or stalled on its way.

Bytes pass as they are and in order, both ways at once. Bounded: a direction holds at most `LINE_CHUNKS` chunks, so
a receiver that does not read stops the sender. HTTP is looked at only where single requests are to be answered
here or their answers lost. Who connects, and when faults change, is ``stress.proxy``'s.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

import anyio
import anyio.lowlevel

from stress.httpfaults import Answer, AnswerEnd, LoseAnswer, forward_requests

__all__ = ["Connection", "Faults", "Network", "reset_at_close"]

CHUNK_BYTES = 128 * 1024
LINE_CHUNKS = 64
#: How far a narrow connection may lag behind its rate and catch up: timers are late by a little.
RATE_SLACK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What is wrong with the network.

    Attributes:
        latency_seconds: How much later everything arrives, each way.
        rate: Bytes a second that a connection carries, each way.
        reset_after: Bytes of a connection, both ways, after which it is reset.
        stall_after: Bytes of a connection, both ways, after which nothing passes until this fault is taken away.
        refuse: Reset new connections and those there are.
    """

    latency_seconds: float = 0.0
    rate: float | None = None
    reset_after: int | None = None
    stall_after: int | None = None
    refuse: bool = False


@dataclass(slots=True, kw_only=True)
class Network:
    """What all connections of a proxy share; changed on its loop only, read anywhere.

    Attributes:
        faults: What is wrong now.
        answer: See `stress.httpfaults.Answer`.
        lose_answer: See `stress.httpfaults.LoseAnswer`.
        connections: How many clients have made.
        bytes_up: From clients.
        bytes_down: From the server.
        changed: Set when the faults change, and replaced.
    """

    faults: Faults
    answer: Answer | None
    lose_answer: LoseAnswer | None
    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    changed: anyio.Event = field(default_factory=anyio.Event)

    def change(self, faults: Faults) -> None:
        """Let other faults be in force, and wake whoever is stalled."""
        self.faults = faults
        changed, self.changed = self.changed, anyio.Event()
        changed.set()


class Connection:
    """A client's connection and the one to the server, as long as both live."""

    def __init__(self, network: Network, client: socket.socket, server: socket.socket) -> None:
        self._network = network
        self._client = client
        self._server = server
        self._up = _Line(network, server)
        self._down = _Line(network, client)
        self._scope = anyio.CancelScope()
        self._moved = 0
        self._lost: AnswerEnd | None = None
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        """Forward until both sides have ended, or one failed: then the other's connection is reset too."""
        with self._scope:
            async with anyio.create_task_group() as group:
                for work in (self._up.run, self._down.run, self._forward_up, self._forward_down):
                    group.start_soon(self._reset_on_error, work)

    def reset(self) -> None:
        """Cut both connections, so that each end sees an error."""
        reset_at_close(self._client)
        reset_at_close(self._server)
        self._scope.cancel()

    async def receive(self) -> bytes:
        """Return the client's next bytes, or none at their end."""
        data = await self._read(self._client)
        self._network.bytes_up += len(data)
        return data

    async def send_up(self, data: bytes) -> None:
        """Send to the server."""
        await self._up.put(data)

    async def send_down(self, data: bytes) -> None:
        """Send to the client."""
        await self._down.put(data)

    async def finish(self) -> None:
        """End what is sent to the client, and wait until it ends too."""
        self._down.close()
        while await self.receive():
            pass
        self._scope.cancel()

    def lose_next_answer(self, method: str) -> None:
        """Let the server's next answer be lost, and then the connection."""
        self._lost = AnswerEnd(method)

    async def _forward_up(self) -> None:
        if self._network.answer or self._network.lose_answer:
            await forward_requests(self, self._network.answer, self._network.lose_answer)
        else:
            while data := await self.receive():
                await self._up.put(data)
        self._up.close()

    async def _forward_down(self) -> None:
        while data := await self._read(self._server):
            self._network.bytes_down += len(data)
            if self._lost is None:
                await self._down.put(data)
            elif self._lost.feed(data):
                break
        if self._lost is not None:
            self.reset()
        self._down.close()

    async def _read(self, source: socket.socket) -> bytes:
        await self._pass_faults()
        faults = self._network.faults
        ends = [end - self._moved for end in (faults.reset_after, faults.stall_after) if end is not None]
        data = await asyncio.get_running_loop().sock_recv(source, min([CHUNK_BYTES, *ends]))
        if data:
            await self._pass_faults()  # those set while nothing came
        self._moved += len(data)
        return data

    async def _pass_faults(self) -> None:
        """Wait while stalled, and do not return from a reset."""
        while True:
            faults, changed = self._network.faults, self._network.changed
            if faults.reset_after is not None and self._moved >= faults.reset_after:
                self.reset()
                await anyio.lowlevel.checkpoint()
            if faults.stall_after is None or self._moved < faults.stall_after:
                return
            await changed.wait()

    async def _reset_on_error(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except OSError:
            self.reset()


class _Line:
    """One direction: what is put in comes out at the socket at the rate and after the latency, in order."""

    def __init__(self, network: Network, destination: socket.socket) -> None:
        self._network = network
        self._destination = destination
        self._entry, self._exit = anyio.create_memory_object_stream[tuple[float, bytes]](LINE_CHUNKS)
        self._inside = 0
        self._free_at = 0.0

    async def put(self, data: bytes) -> None:
        """Send *data*; waits as long as a sender on such a line would."""
        faults = self._network.faults
        if faults.rate is not None:
            self._free_at = max(self._free_at, monotonic() - RATE_SLACK_SECONDS) + len(data) / faults.rate
            await anyio.sleep(max(0.0, self._free_at - monotonic()))
        if faults.latency_seconds or self._inside:
            self._inside += 1
            await self._entry.send((monotonic() + faults.latency_seconds, data))
        else:
            await self._send(data)

    def close(self) -> None:
        """Let the destination see the end, after what is inside."""
        self._entry.close()

    async def run(self) -> None:
        """Bring out what is inside, each when it is due, and at last the end."""
        with self._entry, self._exit:
            async for due, data in self._exit:
                await anyio.sleep(max(0.0, due - monotonic()))
                await self._send(data)
                self._inside -= 1
            with suppress(OSError):  # it may have gone already
                self._destination.shutdown(socket.SHUT_WR)

    async def _send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._destination, data)


def reset_at_close(connection: socket.socket) -> None:
    """Let closing *connection* reset it, rather than end it in order."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
