"""Time limits of waits: a wait goes on as long as there is progress, unless a hard limit is set.

Guarantees: every wait ends (B2). By default, it ends after ``flush_timeout`` without progress, or after
``flush_deadline``, whichever comes first; a caller's own ``timeout`` is a hard limit.

Code that transfers bytes calls `moved`, on any thread; if they belong to a save, its service's `Progress` is updated.

What does not belong here: the awaited events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any

from async_ckpt.handle import Outcome

__all__ = ["Limit", "Patience", "Progress", "moved", "moving"]


class Progress:
    """The time of the last progress.

    Attributes:
        seconds: that time, as ``time.monotonic`` counts.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = -math.inf

    def note(self) -> None:
        """Note progress now."""
        self.seconds = monotonic()


_progress: ContextVar[Progress | None] = ContextVar("async_ckpt_progress", default=None)


@contextmanager
def moving(progress: Progress) -> Iterator[None]:
    """Update *progress* from the body, from tasks that it starts, and from workers that these call."""
    before = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(before)


def moved() -> None:
    """Note that bytes were transferred: called rarely enough to be cheap, and often enough for a slow connection."""
    progress = _progress.get()
    if progress is not None:
        progress.note()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long to wait at the most.

    Attributes:
        idle_seconds: the longest time without progress.
        total_seconds: the longest time in any case.
    """

    idle_seconds: float
    total_seconds: float = math.inf

    @classmethod
    def hard(cls, seconds: float) -> Limit:
        """Return a hard limit of *seconds*."""
        return cls(idle_seconds=math.inf, total_seconds=seconds)


class Patience:
    """One wait, which begins now.

    Args:
        limit: the limit of the wait.
        moved_seconds: returns the time of the last progress; called only when it matters.
        clock: returns a monotonic time in seconds.
    """

    def __init__(
        self, limit: Limit, moved_seconds: Callable[[], float], *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._limit = limit
        self._ask = moved_seconds
        self._clock = clock
        self._began = self._moved = clock()
        self._is_over = False

    def left(self) -> float:
        """Return how many seconds to wait before calling this again; zero or less once the limit is reached."""
        now = self._clock()
        total = self._began + self._limit.total_seconds - now
        self._is_over = total <= 0
        if total > 0 and self._moved + self._limit.idle_seconds <= now:
            self._moved = max(self._moved, self._ask())
        return min(total, self._moved + self._limit.idle_seconds - now)

    def wait(self, outcome: Outcome[Any]) -> None:
        """Wait until *outcome* is set, without taking its result.

        Raises:
            TimeoutError: the limit is reached.
        """
        while not outcome.done():
            left = self.left()
            if left <= 0:
                raise TimeoutError
            try:
                outcome.exception(left)
            except TimeoutError:
                continue

    @property
    def told(self) -> str:
        """The duration for messages, such as " after 5 s"; empty if the limit was zero."""
        if self._is_over:
            return f" after {self._limit.total_seconds:g} s" if self._limit.total_seconds > 0 else ""
        return f" after {self._limit.idle_seconds:g} s without progress"
