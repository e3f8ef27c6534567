"""The retry policy: whether and when a failed storage request is repeated; clock, sleep and randomness are injected.

Guarantees: at most ``attempts`` calls, those not counted that a store throttled; no new call later than
``deadline_seconds`` after the first; permanent errors are raised at once (E3).

What does not belong here: what a request is, and whether it is safe to repeat; the stores know that.
"""

from __future__ import annotations

import errno
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import anyio

from async_ckpt.errors import OptionError, StoreError, ThrottledError, TransientStoreError

__all__ = ["RetryPolicy", "Retrying", "call_with_retry", "is_transient"]

P = ParamSpec("P")
T = TypeVar("T")

_chance = random.SystemRandom()
"""Not Python's global generator: drawing from it would change the random numbers of a seeded training."""

_log = logging.getLogger("async_ckpt.retry")

_TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a failed storage request is repeated, and with what delays.

    Attributes:
        attempts: calls in total; 1 never retries. The default bridges, on average, 15 seconds in which storage refuses
            every request at once, as while a server restarts. A call that the store throttles (a ``ThrottledError``)
            uses up none of them: where thousands of ranks write at once, each may be told many times to wait.
        initial_seconds: the longest first delay; the bound doubles with each attempt.
        maximum_seconds: the longest single delay.
        deadline_seconds: no delay ends later than this after the first call began.
        stall_seconds: a request fails if it transfers no byte for this long. A request that makes progress has no
            limit: on a slow line a part may take long.

    Raises:
        OptionError: a value is not valid.
    """

    attempts: int = 10
    initial_seconds: float = 0.1
    maximum_seconds: float = 10.0
    deadline_seconds: float = 120.0
    stall_seconds: float = 30.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise OptionError(f"retry attempts must be a whole number of at least 1, not {self.attempts!r}")
        for name in ("initial_seconds", "maximum_seconds", "deadline_seconds", "stall_seconds"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name == "stall_seconds" and value == 0:
                raise OptionError("retry stall_seconds must be more than 0: every request takes some time")
            if not number or not math.isfinite(value) or value < 0:
                raise OptionError(f"retry {name} must be a finite number of at least 0, not {value!r}")

    def delay(self, attempt: int, random: Callable[[], float]) -> float:
        """Return the delay after the failure of *attempt*, with "full jitter".

        A uniformly random delay between zero and the exponential bound is best at spreading out clients that failed
        together (AWS architecture blog, "Exponential backoff and jitter").

        Args:
            attempt: the number of the call that failed, counted from 1.
            random: returns a number in [0, 1).

        Returns:
            Seconds.
        """
        # min() inside: 2.0 ** 1024 would overflow, and no bound needs more doublings than this.
        bound = min(self.maximum_seconds, self.initial_seconds * 2.0 ** min(attempt - 1, 60))
        return bound * random()


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed if it is repeated.

    Args:
        error: the request's error; if it was translated, its cause counts as well.

    Returns:
        True for lost connections, timeouts and a busy system; False for everything else: missing permissions, a missing
        file, a full or read-only disk, a wrong argument.
    """
    if isinstance(error, TransientStoreError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    cause = error.__cause__
    return isinstance(error, StoreError) and cause is not None and is_transient(cause)


async def call_with_retry(
    policy: RetryPolicy,
    function: Callable[P, Awaitable[T]],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Await ``function(*args, **kwargs)``, and repeat it after transient errors, as *policy* allows.

    Args:
        policy: how often and how long.
        function: an operation that may safely be repeated.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        What *function* returned.

    Raises:
        BaseException: the error of the last call.
    """
    return await Retrying(policy).call(function, *args, **kwargs)


class Retrying:
    """A policy with its clock, its sleep and its random source.

    Args:
        policy: how often and how long.
        sleep: awaits the given number of seconds.
        clock: returns a monotonic time in seconds.
        random: returns a number in [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = _chance.random,
    ) -> None:
        self._policy = policy
        self._sleep = sleep
        self._clock = clock
        self._random = random

    async def call(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``function(*args, **kwargs)``, and repeat it after transient errors, as the policy allows."""
        return await self.advance(lambda: 0, function, *args, **kwargs)

    async def advance(
        self,
        position: Callable[[], int],
        function: Callable[P, Awaitable[T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Like ``call``, for a *function* that resumes where it broke off.

        When *position* has changed, attempts and time are counted anew: during a long transfer a connection may break
        many times, and the transfer still succeeds.
        """
        reached, began, attempt, throttled = position(), self._clock(), 1, 0
        while True:
            try:
                return await function(*args, **kwargs)
            except Exception as error:
                if position() != reached:
                    reached, began, attempt, throttled = position(), self._clock(), 1, 0
                if isinstance(error, ThrottledError) and self._policy.attempts > 1:
                    throttled += 1
                if attempt - throttled >= self._policy.attempts or not is_transient(error):
                    raise
                pause = self._policy.delay(attempt, self._random)
                if self._clock() - began + pause > self._policy.deadline_seconds:
                    raise
                _log.info("attempt %d failed, trying again in %.2f s: %s", attempt, pause, error)
            await self._sleep(pause)
            attempt += 1
