"""A proxy in front of any server that makes the network bad: slow, narrow, cut, stalled, refusing.

``FaultProxy`` runs on a thread with a loop of its own; faults are set, and what passed is read, from any other
thread. When the context is left, every connection and the thread have ended. What happens to a connection is
``stress.proxied``'s, what is known of HTTP ``stress.httpfaults``'.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal

from stress.httpfaults import Answer, LoseAnswer
from stress.proxied import Connection, Faults, Network, reset_at_close

__all__ = ["FaultProxy", "Faults"]

HOST = "127.0.0.1"


class FaultProxy:
    """A context manager; inside, clients of `url` reach the server through the faults.

    Args:
        target: The server's URL.
        answer: Asked of every request, on the proxy's thread; what it returns is the answer instead of the server's.
        lose_answer: Asked of every request that is forwarded; if true, the server carries it out and the client's
            connection is reset instead of the answer.
        faults: In force from the start.

    What a hook raises ends the proxy, and is raised when the context is left.
    """

    def __init__(
        self,
        target: str,
        *,
        answer: Answer | None = None,
        lose_answer: LoseAnswer | None = None,
        faults: Faults | None = None,
    ) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or HOST, parts.port or 80)
        self._network = Network(faults=faults or Faults(), answer=answer, lose_answer=lose_answer)
        self._open: set[Connection] = set()
        self._stack = ExitStack()

    def __enter__(self) -> FaultProxy:
        """Start to serve."""
        with ExitStack() as stack:
            self._portal: BlockingPortal = stack.enter_context(start_blocking_portal("asyncio"))
            ended, (self.port, scope) = self._portal.start_task(self._serve)
            stack.callback(ended.result)
            stack.callback(self._portal.call, scope.cancel)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every connection."""
        self._stack.close()

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"http://{HOST}:{self.port}"

    @property
    def faults(self) -> Faults:
        """What is wrong now."""
        return self._network.faults

    @property
    def connections(self) -> int:
        """How many connections clients have made."""
        return self._network.connections

    @property
    def bytes_up(self) -> int:
        """How many bytes came from clients."""
        return self._network.bytes_up

    @property
    def bytes_down(self) -> int:
        """How many bytes came from the server."""
        return self._network.bytes_down

    def set(self, **changes: Any) -> None:
        """Change some of the `Faults`, and leave the others; they are in force when this returns."""
        self._portal.call(self._apply, replace(self.faults, **changes))

    def clear(self) -> None:
        """Take all faults away."""
        self._portal.call(self._apply, Faults())

    def _apply(self, faults: Faults) -> None:
        self._network.change(faults)
        if faults.refuse:
            for connection in self._open:
                connection.reset()

    async def _serve(self, *, task_status: TaskStatus[tuple[int, anyio.CancelScope]]) -> None:
        with socket.create_server((HOST, 0)) as listener:
            listener.setblocking(False)
            async with anyio.create_task_group() as group:
                task_status.started((listener.getsockname()[1], group.cancel_scope))
                while True:
                    client, _ = await asyncio.get_running_loop().sock_accept(listener)
                    group.start_soon(self._handle, client)

    async def _handle(self, client: socket.socket) -> None:
        self._network.connections += 1
        with client, socket.socket() as server:
            server.setblocking(False)
            try:
                if self.faults.refuse:
                    raise ConnectionRefusedError
                await asyncio.get_running_loop().sock_connect(server, self._target)
            except OSError:
                reset_at_close(client)
                return
            connection = Connection(self._network, client, server)
            self._open.add(connection)
            try:
                await connection.run()
            finally:
                self._open.discard(connection)
