"""A work list of operations to check, and slots that bound how many run at a time.

What does not belong here: what makes an operation fit to run (queue).
"""

from __future__ import annotations

from heapq import heappop, heappush

__all__ = ["Slots", "WorkList"]


class WorkList:
    """Ids of operations to check, each once, oldest first."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._listed: set[int] = set()

    def add(self, number: int) -> None:
        """Add an operation, unless it is listed already."""
        if number not in self._listed:
            self._listed.add(number)
            heappush(self._heap, number)

    def __bool__(self) -> bool:
        """Whether any is listed."""
        return bool(self._heap)

    @property
    def first(self) -> int | None:
        """The oldest; ``None`` if there is none."""
        return self._heap[0] if self._heap else None

    def pop(self) -> int | None:
        """Remove and return the oldest; ``None`` if there is none."""
        if not self._heap:
            return None
        number = heappop(self._heap)
        self._listed.discard(number)
        return number


class Slots:
    """A bounded number of running operations; others wait, oldest first.

    Args:
        number: how many may run at a time.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._running: set[int] = set()
        self._waiting = WorkList()

    @property
    def is_used(self) -> bool:
        """Whether any operation runs or waits."""
        return bool(self._running) or self._waiting.first is not None

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self._running) < self._number

    def admits(self, number: int) -> bool:
        """Return whether an operation may run now: a slot is free, and nothing older waits."""
        first = self._waiting.first
        return self.has_room and (first is None or first >= number)

    def wait(self, number: int) -> None:
        """Let an operation wait for a slot."""
        self._waiting.add(number)

    def pop(self) -> int | None:
        """If a slot is free, remove and return the oldest waiting operation."""
        return self._waiting.pop() if self.has_room else None

    def take(self, number: int) -> None:
        """Give an operation a slot."""
        self._running.add(number)

    def release(self, number: int) -> None:
        """Free the slot of an operation, if it has one."""
        self._running.discard(number)
