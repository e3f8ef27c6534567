"""The future of a save: a ``concurrent.futures.Future``, as torch's ``async_save`` returns one.

Guarantees: once somebody has asked for the result or the exception, no later call raises the failure again; if nobody
asks, the next call raises it (E1). Callbacks may block: they run on a thread of their own.

What does not belong here: how a save ends (`handle`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # a class of its own before Python 3.11
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import ref

from async_ckpt.errors import FlushTimeoutError
from async_ckpt.handle import Handle, Waiter
from async_ckpt.system import threads

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from async_ckpt.sharded.writing.writer import ShardedWriter

__all__ = ["SaveFuture"]

logger = logging.getLogger(__name__)


class SaveFuture(Future["Metadata | None"]):
    """A save in progress. Its result is the checkpoint's ``Metadata`` on the first rank, ``None`` on the others.

    It cannot be cancelled: the other ranks count on this one.

    Args:
        handle: the save's handle.
        writer: writes the save.
    """

    def __init__(self, handle: Handle, writer: ShardedWriter) -> None:
        super().__init__()
        self._handle = handle
        self._calls: deque[Callable[[Any], object]] = deque()
        self._waiter: Waiter | None = None
        self.set_running_or_notify_cancel()
        handle.add_done_callback(lambda ended: self._settle(ended, writer))

    @property
    def handle(self) -> Handle:
        """The service's handle of the save: it can be awaited, and has the state of the save."""
        return self._handle

    def result(self, timeout: float | None = None) -> Metadata | None:
        """Wait, and return the metadata or raise why the save is not durable, or ``TimeoutError`` after *timeout* s."""
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error
        finally:
            del error  # it refers to this frame now

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return why the save is not durable, ``None`` if it is; ``TimeoutError`` after *timeout* seconds."""
        try:
            self._handle.wait(timeout)
        except FlushTimeoutError as error:
            raise FutureTimeoutError(str(error)) from None
        except Exception as error:
            super().exception()  # set by now, or in a moment
            return error
        return super().exception()

    def add_done_callback(self, fn: Callable[[Future[Metadata | None]], object]) -> None:
        """Call *fn* with this future when the save has ended, on a thread where it may block; or else at once."""
        if not self.done() and self._waiter is None:
            # The callback reports a failure, so no later call shall raise it.
            waiter = self._waiter = Waiter(lambda: True)
            self._handle._waiters[ref(waiter)] = None
        self._calls.append(fn)
        if self.done():  # the thread that removes a callback calls it
            self._call_all()

    def _settle(self, handle: Handle, writer: ShardedWriter) -> None:
        """Set the future to the outcome of the save, on a thread of its own.

        This is the loop thread. It must not wait for the program's callbacks, nor for a lock that is held by a thread
        which a signal handler has interrupted (L1).
        """

        def settle() -> None:
            error = handle._outcome.exception()
            if error is None:
                self.set_result(writer.metadata)
            else:
                self.set_exception(error)
            self._call_all()

        try:
            threads.start(threading.Thread(target=settle, name="async_ckpt-future"))
        except RuntimeError:  # the interpreter is ending, and starts none
            settle()

    def _call_all(self) -> None:
        try:
            with suppress(IndexError):  # another thread was faster
                while self._calls:
                    self._call(self._calls.popleft())
        finally:
            self._waiter = None

    def _call(self, function: Callable[[Any], object]) -> None:
        try:
            function(self)
        except Exception:
            logger.exception("a callback of the save of %r failed", self._handle.shown_url)
