"""Makes the requests of remote stores: translates errors, sets time limits, limits their rate and repeats them.

Guarantees: errors are ``StoreError``s that name the location and the stage, or the FileNotFoundError of a read; a
request without progress fails (aiohttp's own limits do not cover sending); after the store has asked for fewer
requests, fewer run at a time (E3, B2).

What does not belong here: the requests themselves, and explaining errors, which each store does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from random import Random
from time import monotonic
from typing import ParamSpec, TypeVar

import anyio

from async_ckpt.errors import StoreError, ThrottledError
from async_ckpt.retry import Retrying, RetryPolicy
from async_ckpt.stores.base import Location
from async_ckpt.stores.scatter import Scatter
from async_ckpt.telemetry.patience import moved

__all__ = ["Explain", "Pace", "Requests", "Verdict", "stall_timeout"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a store's error means.

    Attributes:
        kind: the class of the error to raise.
        missing: whether the location does not exist.
        advice: what to do; may be empty.
        reason: what happened, if the error's own text does not say it.
    """

    kind: type[StoreError] = StoreError
    missing: bool = False
    advice: str = ""
    reason: str = ""


Explain = Callable[[Exception], Verdict]


class Pace:
    """Limits concurrent requests: half as many when the store throttles, one more after each round of success.

    That is the additive increase and multiplicative decrease of TCP's congestion avoidance (RFC 5681). Not thread-safe:
    the loop's thread owns it.

    Args:
        most: the limit while the store does not throttle.
        random: returns numbers from 0 to 1; its own generator by default, as a training's seed is not to be used up.
    """

    def __init__(self, most: int, *, random: Callable[[], float] | None = None) -> None:
        self._most = float(most)
        self._random = random or Random().random
        self._next_seconds = 0.0
        self._allowed = float(most)
        self._running = 0
        self._slowed = 0  # how often; requests that began before the last time say nothing new
        self._changed = anyio.Condition()

    @property
    def allowed(self) -> int:
        """The present limit."""
        return int(self._allowed)

    @asynccontextmanager
    async def turn(self, *, apart_seconds: float = 0.0) -> AsyncIterator[None]:
        """Wait for a free slot, and hold it during the body, which makes one request.

        Args:
            apart_seconds: see `due`.
        """
        async with self._changed:
            while self._running >= self.allowed:
                await self._changed.wait()
            self._running += 1
        slowed = self._slowed
        try:
            await self.due(apart_seconds)
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

    async def due(self, apart_seconds: float) -> None:
        """Wait until a request may start, without a slot for it.

        Args:
            apart_seconds: the least time between the starts of two requests. The first one after a pause starts at
                random within it, since many processes may come out of a pause at the same moment.
        """
        if apart_seconds == 0:
            return
        now = anyio.current_time()
        due = self._next_seconds if self._next_seconds > now else now + self._random() * apart_seconds
        self._next_seconds = due + apart_seconds
        await anyio.sleep(due - now)


@contextmanager
def stall_timeout(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise TimeoutError in the body if the yielded function is not called for *seconds*."""
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
        raise TimeoutError(errno.ETIMEDOUT, f"no byte was transferred for {seconds:g} s")


class Requests:
    """The requests of one store.

    Args:
        explain: explains an error of the store's client library.
        retry: how often a request is repeated, and how long it may stall.
    """

    def __init__(self, explain: Explain, retry: RetryPolicy) -> None:
        self.stall_seconds = retry.stall_seconds
        self._explain = explain
        self._retrying = Retrying(retry)

    @contextmanager
    def translating(self, stage: str, location: Location) -> Iterator[None]:
        """Translate errors into StoreError; a missing file to read raises FileNotFoundError."""
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
        """Make a small request, which must end within ``stall_seconds``."""
        with self.translating(stage, location), stall_timeout(self.stall_seconds):
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
        """Make a small request, and repeat it after transient errors."""
        return await self._retrying.call(self.once, stage, location, function, *args, **kwargs)

    async def again(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await *function*, which has its own translation and time limits, and repeat it after transient errors."""
        return await self._retrying.call(function, *args, **kwargs)

    async def advance(
        self,
        position: Callable[[], int],
        function: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Like ``again``, for a *function* that resumes; after *position* has changed, attempts and time count anew."""
        return await self._retrying.advance(position, function, *args, **kwargs)

    async def look_up_outcome(
        self, location: Location, doubt: StoreError, look: Callable[[], Awaitable[T]]
    ) -> T:
        """Await *look*, which checks the outcome of a commit that raised *doubt*; report both errors if it fails (E3).

        Only this look-up is repeated: those between the attempts at a commit are repeated with the attempts.
        """
        try:
            return await self.again(look)
        except StoreError as error:
            advice = f"It is unknown whether it took effect, because the look-up failed: {_reason(error)}"
            raise StoreError.during("commit", location.url, OSError(_reason(doubt)), advice) from doubt

    async def fill(
        self, scatter: Scatter, function: Callable[P, Awaitable[None]], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Like ``advance``, for a *function* that fills *scatter* from its position on."""
        if scatter.left:
            await self.advance(lambda: scatter.done, function, *args, **kwargs)


def _reason(error: StoreError) -> str:
    """Return the error's message, without the file name."""
    return str(error).removeprefix(f"cannot {error.stage} {error.location!r}: ").removesuffix(".")
