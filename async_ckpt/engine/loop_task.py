"""A coroutine on the loop thread for which a caller on another thread waits.

Guarantees: it ends with its service and with its caller. If it hangs in storage, it is left behind after a moment (B2).

What does not belong here: what the coroutine does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Generic, TypeVar

import anyio

from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import ServiceClosedError
from async_ckpt.handle import Outcome

__all__ = ["END_SECONDS", "LoopTask"]

T = TypeVar("T")

_log = logging.getLogger("async_ckpt.engine")

END_SECONDS = 1.0
"""Enough for a coroutine that only reads."""


class LoopTask(Generic[T]):
    """A coroutine that runs once.

    Args:
        runtime: runs it.
        function: makes the coroutine.
        end_seconds: how long to wait for its end once it is stopped.

    Attributes:
        outcome: its result or its error; if it was stopped, the reason.
    """

    def __init__(
        self, runtime: Runtime, function: Callable[[], Awaitable[T]], *, end_seconds: float = END_SECONDS
    ) -> None:
        self.outcome: Outcome[T] = Outcome()
        self._runtime = runtime
        self._function = function
        self._ended: Outcome[None] = Outcome()
        self._scope: anyio.CancelScope | None = None
        self._reason: BaseException | None = None
        self._started = False
        self._end_seconds = end_seconds
        self._end_by: float | None = None

    def start(self) -> None:
        """Start it, from any thread but the loop's; called once."""
        self._started = True
        self._runtime.spawn(self._run)

    def stop(self, reason: BaseException) -> None:
        """Stop it, from any thread; its outcome becomes *reason*."""
        if self._end_by is None:
            self._end_by = monotonic() + self._end_seconds
        with suppress(ServiceClosedError):  # the loop has ended
            self._runtime.call(self._stop, reason)

    def end(self, reason: BaseException) -> bool:
        """Stop it and wait a moment for its end; return whether it has ended."""
        self.stop(reason)
        if self._started and self._end_by is not None:
            try:
                self._ended.exception(self._end_by - monotonic())
            except TimeoutError:
                _log.info("a request does not end, because storage does not answer; it is left behind")
                return False
        return True

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call *callback* once it has ended: at once, or on the loop thread."""
        if self._started:
            self._ended.add_done_callback(callback)
        else:
            callback()

    def close(self) -> None:
        """End it, if it is still running."""
        if self._started and not self._ended.done():
            self.end(ServiceClosedError("its caller does not wait for it any more"))

    # -- on the loop thread

    def _stop(self, reason: BaseException) -> None:
        self._reason = self._reason or reason
        if self._scope is not None:
            self._scope.cancel()
        self._fail(reason)

    def _fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    async def _run(self) -> None:
        try:
            with anyio.CancelScope() as self._scope:
                if self._reason is None:
                    result = await self._function()
                    if not self.outcome.done():
                        self.outcome.set_result(result)
        except Exception as error:
            self._fail(error)
        finally:
            self._fail(self._reason or ServiceClosedError("the loop ended meanwhile"))
            self._ended.set_result(None)
