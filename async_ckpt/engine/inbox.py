"""The calls that other threads send to the loop thread.

Guarantees: calls are made on the loop thread, in the order in which they were sent, in a context of the loop's, not the
sender's. Sending takes no lock and does not wait, so a signal handler may send while its own thread is sending (L1).
Once the loop has ended, calls are refused; a call that was not refused is made.

What does not belong here: what the calls do.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from async_ckpt.errors import ServiceClosedError

__all__ = ["Inbox"]

_MOST_BYTES = 4096
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # where the loop has just ended, and SIGPIPE is not ignored

_send = ctypes.PyDLL(None).send  # keeps the GIL
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)


class _Sender:
    """Owns the descriptor of a socket that does not block; it is closed when nobody can use it any more."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def wake(self) -> None:
        """Send a byte. If the socket is full, the loop is about to wake; or it has just ended."""
        _send(self._number, b"\0", 1, _NO_SIGNAL)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._number)


class Inbox:
    """Calls to be made on one loop.

    A byte in a socket wakes the loop. ``call_soon_threadsafe`` does the same at twice the cost: asyncio reads its own
    socket twice each time, and each read releases the GIL. So would Python's ``send``: on busy CPUs, training would get
    the GIL back milliseconds later.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._sender: _Sender | None = None
        self._is_closed = False

    def send(self, call: Callable[[], object]) -> None:
        """Have *call*, which raises nothing, made on the loop thread; return at once.

        Raises:
            ServiceClosedError: the loop has ended.
        """
        self._calls.append(call)
        if self._is_closed:
            try:
                self._calls.remove(call)
            except ValueError:  # the loop thread read the inbox once more
                return
            raise ServiceClosedError("the service was closed meanwhile")
        sender = self._sender
        if sender is not None:  # otherwise the loop reads the inbox when it begins
            sender.wake()

    @contextmanager
    def open(self, receiver: socket.socket, sender: socket.socket) -> Iterator[None]:
        """Make the calls on the running loop, until the end of the body; also those that were sent before.

        Args:
            receiver: one end of a ``socketpair``; closed at the end.
            sender: the other end; likewise.
        """
        loop = asyncio.get_running_loop()
        try:
            receiver.setblocking(False)
            sender.setblocking(False)
            loop.add_reader(receiver, self._wake, receiver)
            self._sender = _Sender(sender.fileno())
            self._make_calls()
            yield
        finally:
            self._is_closed = True
            self._make_calls()
            loop.remove_reader(receiver)
            self._sender = None
            sender.detach()
            receiver.close()

    def _wake(self, receiver: socket.socket) -> None:
        with suppress(BlockingIOError):
            receiver.recv(_MOST_BYTES)  # first: a call that is sent from here on wakes the loop again
        self._make_calls()

    def _make_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()
