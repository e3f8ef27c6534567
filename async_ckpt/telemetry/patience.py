"""How long anybody waits for what is under way: for as long as it gets on, unless a limit is set.

Guarantees: every wait ends (B2). With no limit of its caller's it ends once nothing has got on for ``flush_timeout``,
or ``flush_deadline`` has passed, whichever is first; a caller's own ``timeout`` is a limit whatever gets on.

Code that moves bytes calls `moved`, on any thread; if they belong to a save, its service's `Progress` is told.

What does not belong here: what is waited for.
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
    """When something last got on.

    Attributes:
        seconds: then, on the clock of ``time.monotonic``.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = -math.inf

    def note(self) -> None:
        """Something gets on."""
        self.seconds = monotonic()


_progress: ContextVar[Progress | None] = ContextVar("async_ckpt_progress", default=None)


@contextmanager
def moving(progress: Progress) -> Iterator[None]:
    """Note in *progress* what moves in the body, in the tasks that it begins, and in the workers that they call."""
    before = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(before)


def moved() -> None:
    """Tell that some bytes have moved: seldom enough that it costs nothing, often enough for a slow line."""
    progress = _progress.get()
    if progress is not None:
        progress.note()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long to wait at the most.

    Attributes:
        idle_seconds: since something last got on.
        total_seconds: in any case.
    """

    idle_seconds: float
    total_seconds: float = math.inf

    @classmethod
    def hard(cls, seconds: float) -> Limit:
        """Return a limit of so many seconds, whatever gets on."""
        return cls(idle_seconds=math.inf, total_seconds=seconds)


class Patience:
    """One wait, from now on.

    Args:
        limit: of the wait.
        moved_seconds: tells when something last got on; asked only where that decides.
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
        """Return how many seconds there are to wait until this is to be asked again; none or fewer once it is over."""
        now = self._clock()
        total = self._began + self._limit.total_seconds - now
        self._is_over = total <= 0
        if total > 0 and self._moved + self._limit.idle_seconds <= now:
            self._moved = max(self._moved, self._ask())
        return min(total, self._moved + self._limit.idle_seconds - now)

    def wait(self, outcome: Outcome[Any]) -> None:
        """Wait until *outcome* is set, without taking it.

        Raises:
            TimeoutError: it is over.
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
        """How long it was, to be put behind a word; nothing where there was no time at all."""
        if self._is_over:
            return f" after {self._limit.total_seconds:g} s" if self._limit.total_seconds > 0 else ""
        return f" after {self._limit.idle_seconds:g} s without progress"
