"""Small records of who is to be looked at next, and of what only so many may have at a time.

What does not belong here: what makes an operation fit to run (queue).
"""

from __future__ import annotations

from heapq import heappop, heappush

__all__ = ["Slots", "WorkList"]


class WorkList:
    """Operations to be looked at, each once, oldest first."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._listed: set[int] = set()

    def add(self, number: int) -> None:
        """List an operation, if it is not listed."""
        if number not in self._listed:
            self._listed.add(number)
            heappush(self._heap, number)

    def __bool__(self) -> bool:
        """Whether any is listed."""
        return bool(self._heap)

    @property
    def first(self) -> int | None:
        """The oldest; ``None`` where there is none."""
        return self._heap[0] if self._heap else None

    def pop(self) -> int | None:
        """Return the oldest, and strike it off; ``None`` where there is none."""
        if not self._heap:
            return None
        number = heappop(self._heap)
        self._listed.discard(number)
        return number


class Slots:
    """So many operations run at a time; those that found no room wait, oldest first.

    Args:
        number: how many.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._running: set[int] = set()
        self._waiting = WorkList()

    @property
    def is_used(self) -> bool:
        """Whether any runs, or waits."""
        return bool(self._running) or self._waiting.first is not None

    @property
    def has_room(self) -> bool:
        """Whether one more may run."""
        return len(self._running) < self._number

    def admits(self, number: int) -> bool:
        """Return whether an operation may run now: nothing older waits."""
        first = self._waiting.first
        return self.has_room and (first is None or first >= number)

    def wait(self, number: int) -> None:
        """Have an operation wait for room."""
        self._waiting.add(number)

    def pop(self) -> int | None:
        """Return the oldest of those that wait, which does so no longer, where there is room for it."""
        return self._waiting.pop() if self.has_room else None

    def take(self, number: int) -> None:
        """Let an operation run."""
        self._running.add(number)

    def release(self, number: int) -> None:
        """End an operation, running or not."""
        self._running.discard(number)
