"""How any remote store makes its requests: translated, timed, paced and, where that is safe, repeated.

Guarantees: an error that leaves here is a ``StoreError`` that names location and stage, or the
FileNotFoundError of a read; a request of which nothing moves any more fails (aiohttp's own limits do not
cover the sending); after the store has asked for fewer requests, fewer run at a time (E3, B2).

What does not belong here: what a request is, and what a store's errors mean: each store explains its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import ParamSpec, TypeVar

import anyio

from async_ckpt.errors import StoreError, ThrottledError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Location
from async_ckpt.stores.scatter import Scatter
from async_ckpt.telemetry.patience import moved

__all__ = ["Explain", "Pace", "Requests", "Verdict", "patience"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a store's error means.

    Attributes:
        kind: the error to raise.
        missing: there is nothing at the location.
        advice: what to do about it; empty where nothing can be said.
        reason: says what happened, where the error's own text does not.
    """

    kind: type[StoreError] = StoreError
    missing: bool = False
    advice: str = ""
    reason: str = ""


Explain = Callable[[Exception], Verdict]


class Pace:
    """How many requests run at a time: half as many once the store throttles, one more after each round of success.

    That is the additive increase and multiplicative decrease of TCP's congestion avoidance (RFC 5681). For one
    thread, the loop's.

    Args:
        most: requests at a time while the store does not complain.
    """

    def __init__(self, most: int) -> None:
        self._most = float(most)
        self._allowed = float(most)
        self._running = 0
        self._slowed = 0  # how often; requests that began before the last time say nothing new
        self._changed = anyio.Condition()

    @property
    def allowed(self) -> int:
        """Requests that may run at a time now."""
        return int(self._allowed)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold a place for one request, which succeeds or raises inside."""
        async with self._changed:
            while self._running >= self.allowed:
                await self._changed.wait()
            self._running += 1
        slowed = self._slowed
        try:
            yield
            self._allowed = min(self._most, self._allowed + 1 / self._allowed)
        except ThrottledError:
            if slowed == self._slowed:
                self._slowed += 1
                self._allowed = max(1.0, self._allowed / 2)
            raise
        finally:
            self._running -= 1
            with anyio.CancelScope(shield=True):
                async with self._changed:
                    self._changed.notify_all()


@contextmanager
def patience(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise TimeoutError in the body once it has neither ended nor called what this yields for *seconds*."""
    with anyio.CancelScope() as scope:
        put_off_at = 0.0

        def put_off() -> None:
            nonlocal put_off_at
            if (now := monotonic()) >= put_off_at:  # not for each slice: it costs a timer of the loop's
                put_off_at = now + seconds / 16
                scope.deadline = anyio.current_time() + seconds * 17 / 16

        def has_moved() -> None:
            put_off()
            moved()

        put_off()
        yield has_moved
    if scope.cancelled_caught:
        raise TimeoutError(errno.ETIMEDOUT, f"nothing moved for {seconds:g} s")


class Requests:
    """The requests of one store.

    Args:
        explain: tells what an error of the store's client library means.
        retry: when a request is repeated, and how long it may stall.
    """

    def __init__(self, explain: Explain, retry: RetryPolicy) -> None:
        self.stall_seconds = retry.stall_seconds
        self._explain = explain
        self._retrying = Retrying(retry)

    @contextmanager
    def translating(self, stage: str, location: Location) -> Iterator[None]:
        """Raise what goes wrong as a StoreError; that there is nothing to read, as FileNotFoundError."""
        try:
            yield
        except StoreError:
            raise
        except Exception as raised:
            verdict = self._explain(raised)
            error = location.presentable(raised)
            if verdict.missing and stage == "read":
                text = os.strerror(errno.ENOENT)
                raise FileNotFoundError(errno.ENOENT, text, location.url) from error
            cause: Exception = OSError(location.redacted(verdict.reason)) if verdict.reason else error
            raise verdict.kind.during(stage, location.url, cause, verdict.advice) from error

    async def once(
        self,
        stage: str,
        location: Location,
        function: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Make a small request: it may not take longer than the time in which something must move."""
        with self.translating(stage, location), patience(self.stall_seconds):
            return await function(*args, **kwargs)

    async def step(
        self,
        stage: str,
        location: Location,
        function: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Make a small request that may be repeated; again after transient errors."""
        return await self._retrying.call(self.once, stage, location, function, *args, **kwargs)

    async def again(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await *function*, which translates and times itself, again after transient errors."""
        return await self._retrying.call(function, *args, **kwargs)

    async def advance(
        self,
        position: Callable[[], int],
        function: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do the same for a *function* that goes on where it broke off: once *position* has changed, count anew."""
        return await self._retrying.advance(position, function, *args, **kwargs)

    async def last_look(self, location: Location, doubt: StoreError, look: Callable[[], Awaitable[T]]) -> T:
        """Await *look* at what became of a commit that ended in *doubt*; raise a StoreError that tells of both (E3).

        Only this look is repeated: those between the attempts at a commit are repeated with it.
        """
        try:
            return await self.again(look)
        except StoreError as error:
            advice = f"Whether it took effect is not known, for it could not be looked at: {_reason(error)}"
            raise StoreError.during("commit", location.url, OSError(_reason(doubt)), advice) from doubt

    async def fill(
        self, scatter: Scatter, function: Callable[P, Awaitable[None]], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Do the same for a *function* that fills *scatter* from where it stands."""
        if scatter.left:
            await self.advance(lambda: scatter.done, function, *args, **kwargs)


def _reason(error: StoreError) -> str:
    """Return what *error* says, without what it happened to."""
    return str(error).removeprefix(f"cannot {error.stage} {error.location!r}: ").removesuffix(".")
