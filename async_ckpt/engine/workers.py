"""A bounded pool of threads for blocking calls; see ``stores.base.Workers``.

Guarantees:

* A call that was reported as failed because no thread could be started is never made later.
* Neither closing nor the interpreter's exit waits for a thread that hangs in storage (B2): the threads are daemons.
  Such a thread still cleans up when storage answers again.

What does not belong here: the loop thread (runtime).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, ParamSpec, TypeVar

import anyio

from async_ckpt.errors import AbandonedError
from async_ckpt.system import threads

__all__ = ["PoolWorkers"]

P = ParamSpec("P")
T = TypeVar("T")


class PoolWorkers:
    """Threads that are started when needed. ``run`` is called on the loop thread, ``close`` on any.

    Args:
        most: the largest number of threads.
        start: starts a thread.
    """

    def __init__(self, most: int, *, start: Callable[[threading.Thread], None] = threads.start) -> None:
        self._most = most
        self._start = start
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._wanted = 0  # calls of `run` that have not returned
        self._is_closed = False

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* in a worker. Cancellation waits until the call has returned.

        Raises:
            RuntimeError: there is no thread, and the system refuses to start one; *function* is not called.
        """
        job = _Job(partial(copy_context().run, partial(function, *args, **kwargs)))
        self._wanted += 1
        try:
            self._jobs.put(job)  # first: a thread that is about to end looks for jobs last
            try:
                self._start_thread()
            except RuntimeError:
                if not self._threads and job.claim():
                    raise
            with anyio.CancelScope(shield=True):
                await asyncio.wait([job.answer])
        finally:
            self._wanted -= 1
        result: T = job.answer.result()
        return result

    def close(self, seconds: float) -> bool:
        """End the threads, and wait for them for up to *seconds*; return whether all have ended.

        Only code that was left behind calls `run` after that; it gets a new thread.
        """
        until = monotonic() + seconds
        self._is_closed = True
        self._jobs.put(None)
        running = list(self._threads)
        for thread in running:
            with suppress(RuntimeError):  # it has not started yet, and will end at once
                thread.join(max(0.0, until - monotonic()))
        return not any(thread.is_alive() for thread in running)

    def _start_thread(self) -> None:
        """Start a thread if there are too few, at most one for each call."""
        if len(self._threads) >= min(self._wanted, self._most):
            return
        thread = threading.Thread(target=self._work, name="async_ckpt-worker", daemon=True)
        self._threads.add(thread)
        try:
            self._start(thread)
        except BaseException:
            self._threads.discard(thread)
            raise

    def _work(self) -> None:
        here = threading.current_thread()
        while True:
            try:
                job = self._jobs.get(block=not self._is_closed)
            except Empty:
                self._threads.discard(here)  # first: a job that arrives from now on starts another thread
                if self._jobs.empty():
                    break
                self._threads.add(here)
                continue
            if job is not None:
                job.do()
            del job  # it refers to its arguments
        if self._threads:
            self._jobs.put(None)  # let the next one check whether it should end


class _Job:
    """One call, made at most once."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._function: Callable[[], Any] | None = function
        self._claimed = threading.Lock()  # never waited for: only a flag that one thread can win

    def claim(self) -> bool:
        """Return whether the caller is the first to ask; only the first may make or drop the call."""
        return self._claimed.acquire(blocking=False)

    def do(self) -> None:
        """Call the function, unless it was dropped, and set the answer."""
        if not self.claim():
            return
        function, self._function = self._function, None  # it may hold memory of the caller
        assert function is not None
        try:
            result = function()
        except Exception as error:
            self._settle(self.answer.set_exception, error)
        except BaseException as error:  # a SystemExit would end the loop thread instead of one save
            ended = AbandonedError(f"the worker was ended by {type(error).__name__}: {error}")
            ended.__cause__ = error
            self._settle(self.answer.set_exception, ended)
        else:
            self._settle(self.answer.set_result, result)

    def _settle(self, settle: Callable[[Any], object], value: object) -> None:
        def settle_if_awaited() -> None:
            if not self.answer.done():
                settle(value)

        with suppress(RuntimeError):  # the loop has ended, so nothing waits any more
            self.answer.get_loop().call_soon_threadsafe(settle_if_awaited)
