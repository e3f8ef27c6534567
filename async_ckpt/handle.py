"""The caller's view of one request, and the report that it ends with.

Guarantees: a handle ends exactly once (D4); a waiter gets either the report or the error, with the worker's traceback
(E1).

What does not belong here: anything that decides or does the work.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any, Generic, NoReturn, TypeVar, cast
from weakref import ref

import anyio

from async_ckpt.errors import FlushTimeoutError
from async_ckpt.system import priority
from async_ckpt.system.processes import process_id

__all__ = ["Failure", "Handle", "Outcome", "Report", "State", "Waiter", "await_outcome", "deadlock"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_numbers = count()


class Outcome(Generic[T]):
    """A value or an error that the loop thread sets once and any thread may wait for.

    Unlike a ``Future`` it has no lock: a signal handler may suspend a thread at any line and wait for the loop, so the
    loop must never wait for that thread (L1).
    """

    __slots__ = ("_callbacks", "_done", "_error", "_value")

    def __init__(self) -> None:
        # In a dict, by number, because the garbage collector does not track an empty dict.
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._done = False
        self._error: BaseException | None = None
        self._value: T | None = None

    def done(self) -> bool:
        """Return whether it is set."""
        return self._done

    def set_result(self, value: T) -> None:
        """Set the value."""
        self._value = value
        self._settle()

    def set_exception(self, error: BaseException) -> None:
        """Set the error."""
        self._error = error
        self._settle()

    def result(self, timeout: float | None = None) -> T:
        """Wait, and return the value or raise the error; TimeoutError after *timeout* seconds."""
        error = self.exception(timeout)
        if error is None:
            return cast(T, self._value)
        try:
            raise error
        finally:
            del error  # it refers to this frame now

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the error if there is one; TimeoutError after *timeout* seconds."""
        if not self._done:
            done: queue.SimpleQueue[None] = queue.SimpleQueue()  # safe to use in a handler that interrupts it

            def wake() -> None:
                done.put(None)

            number = next(_numbers)
            try:
                self._callbacks[number] = wake
                if self._done:
                    return self._error
                with priority.waiting():
                    done.get(
                        timeout=None if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)
                    )
            except queue.Empty:
                raise TimeoutError from None
            finally:
                self._callbacks.pop(number, None)  # if it was not called
        return self._error

    def add_done_callback(self, callback: Callable[[], object]) -> None:
        """Call *callback* once the outcome is set: on the loop thread, or here and now if it is set already."""
        self._callbacks[next(_numbers)] = callback
        if self._done:
            self._run_callbacks(contained=Exception)

    def _settle(self) -> None:
        assert not self._done, "it ends once"
        self._done = True
        self._run_callbacks(contained=BaseException)  # a SystemExit would end the loop

    def _run_callbacks(self, *, contained: type[BaseException]) -> None:
        # The thread that removes a callback calls it, so it is called once.
        while numbers := list(self._callbacks):
            for number in numbers:
                callback = self._callbacks.pop(number, None)
                if callback is None:
                    continue
                try:
                    callback()
                except contained:
                    with suppress(Exception):  # of the program's own log handlers
                        logger.exception("a callback failed")


class State(str, Enum):
    """The state of a request. The last six are final."""

    ACCEPTED = "accepted"  #: it has its place; its snapshot is being taken
    STAGED = "staged"  #: the snapshot is complete, the state may be mutated
    WRITING = "writing"
    DURABLE = "durable"
    REMOVED = "removed"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"
    DROPPED = "dropped"  #: a removal that was not safe, or a request the service had to give up


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one request.

    Attributes:
        url: the location as the caller wrote it, with passwords and signatures hidden.
        state: the final state.
        nbytes: length of the file in bytes; 0 if a base CheckpointIO wrote it.
        stall_seconds: how long ``save`` blocked its caller.
        seconds: from the call until the end.
    """

    url: str
    state: State
    nbytes: int = 0
    stall_seconds: float = 0.0
    seconds: float = 0.0


class Failure:
    """An error that is reported to its first collector: a waiter of the handle, or the service's next call (E1).

    Attributes:
        handle: the handle of the request that failed.
        error: the error to raise.
        number: rises in the order of the failures.
        is_reported: a waiter of the handle has been given the error.
    """

    def __init__(self, handle: Handle, error: Exception) -> None:
        self.handle = handle
        self.error = error
        self.number = next(_numbers)
        self.is_reported = False
        self._claimed = threading.RLock()  # never waited for: only a flag that one thread can win

    def claim(self) -> bool:
        """Let this thread report the error; only the first thread that asks gets ``True``, every time it asks.

        It asks again if Ctrl-C came before it could report.
        """
        return self._claimed.acquire(blocking=False)


class Waiter:
    """A waiter on a handle. *is_there* is false for a task whose event loop was closed: it will never resume."""

    def __init__(self, is_there: Callable[[], bool]) -> None:
        self.is_there = is_there


class Handle:
    """One accepted save or removal. Waiting returns its report, or raises why it did not take effect.

    Waiting again gives the same answer. Once a waiter has been given the error, no other call of the service raises it.
    """

    def __init__(self, url: str, outcome: Outcome[Report], *, shown_url: str | None = None) -> None:
        self._url = url
        self._shown_url = url if shown_url is None else shown_url
        self._outcome = outcome
        self._pid = process_id()
        self._state = State.ACCEPTED
        self._failure: Failure | None = None
        # Weak references, because Ctrl-C may come just before one is removed; the values are not used.
        self._waiters: dict[ref[Waiter], None] = {}
        self._loop_thread = 0
        self._would_deadlock: Callable[[], bool] = _never

    @property
    def url(self) -> str:
        """The location as the caller wrote it, including passwords; ``load`` takes it."""
        return self._url

    @property
    def shown_url(self) -> str:
        """The location for messages: as the caller wrote it, with passwords and signatures hidden."""
        return self._shown_url

    @property
    def state(self) -> State:
        """The current state of the request."""
        return self._state

    def done(self) -> bool:
        """Return whether the request has ended, successfully or not."""
        return self._outcome.done()

    def wait(self, timeout: float | None = None) -> Report:
        """Block until the request has ended.

        Args:
            timeout: seconds to wait at most; ``None`` waits until the request ends.

        Returns:
            The report: the checkpoint is durable, or the file removed.

        Raises:
            FlushTimeoutError: *timeout* passed first. The request goes on.
            NotDurableError: the request was superseded, cancelled or dropped.
            Exception: the request failed; this is the worker's error.
            RuntimeError: waiting would never end: in another process, in an observer, or in a signal handler that
                interrupted an earlier call.
        """
        self._check_process()
        if not self.done():
            if threading.get_ident() == self._loop_thread:
                raise RuntimeError("an observer or a callback must not wait for the service that calls it")
            if self._would_deadlock():
                raise deadlock(self._shown_url)
        with self._waiting(lambda: True):
            try:
                self._outcome.exception(timeout)
            except TimeoutError:
                raise FlushTimeoutError(
                    f"{self._shown_url!r} is {self._state.value} after {timeout} s"
                ) from None
        return self._result()

    def __await__(self) -> Generator[Any, Any, Report]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> Report:
        self._check_process()
        with self._waiting(_liveness_of_loop()):
            await await_outcome(self._outcome)
        return self._result()

    def add_done_callback(self, callback: Callable[[Handle], object]) -> None:
        """Call *callback* with this handle once the request has ended, on the service's loop thread or at once."""
        self._outcome.add_done_callback(lambda: callback(self))

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: the copy would never end, and waiting for it would never return."""
        raise TypeError(
            f"the handle of {self._shown_url!r} cannot be copied or pickled; keep its url instead"
        )

    def __repr__(self) -> str:
        return f"<Handle {self._shown_url!r} {self._state.value}>"

    @property
    def is_waited_for(self) -> bool:
        """Return whether anything waits on this handle now."""
        waiters = [waiter() for waiter in self._waiters.copy()]  # in one step, as other threads change it
        return any(waiter is not None and waiter.is_there() for waiter in waiters)

    @contextmanager
    def _waiting(self, is_there: Callable[[], bool]) -> Iterator[None]:
        waiter = Waiter(is_there)
        known = ref(waiter)
        try:
            try:
                self._waiters[known] = None
                yield
                if self._failure is not None:
                    self._failure.claim()
            finally:
                self._waiters.pop(known, None)
        finally:  # again: Ctrl-C may have come first, and its traceback keeps the waiter alive
            self._waiters.pop(known, None)

    def _result(self) -> Report:
        try:
            return self._outcome.result()
        finally:
            if self._failure is not None and sys.exc_info()[1] is self._failure.error:
                # Last: if Ctrl-C comes before this line, the next call reports the error.
                self._failure.is_reported = True

    def _check_process(self) -> None:
        if process_id() != self._pid:
            raise RuntimeError(
                f"the save of {self._shown_url!r} belongs to another process; wait for it there"
            )


def _never() -> bool:
    return False


def deadlock(shown_url: str) -> RuntimeError:
    """Return the error for a wait that could never end (L1)."""
    return RuntimeError(
        f"waiting for {shown_url!r} here would never end: it comes after a call that this signal handler interrupted, "
        "which goes on only when the handler returns; wait for it after the handler"
    )


async def await_outcome(outcome: Outcome[Any]) -> None:
    """Wait under asyncio or trio until *outcome* is set; needs no thread and does not take the result."""
    event = anyio.Event()
    outcome.add_done_callback(_threadsafe_set(event))
    with priority.waiting():
        await event.wait()


def _liveness_of_loop() -> Callable[[], bool]:
    """Return a function that returns whether the running event loop is still alive; trio's ends with its last task."""
    if _in_trio():
        return lambda: True
    import asyncio

    loop = asyncio.get_running_loop()
    return lambda: not loop.is_closed()


def _in_trio() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def _threadsafe_set(event: anyio.Event) -> Callable[[], None]:
    """Return a function that sets *event* from any thread; it never blocks, and ignores a loop that has ended."""
    if _in_trio():
        schedule = sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon
    else:
        import asyncio

        schedule = asyncio.get_running_loop().call_soon_threadsafe

    def wake() -> None:
        try:
            schedule(event.set)
        except RuntimeError:  # the waiter's loop has ended, so nobody waits any more
            return

    return wake
