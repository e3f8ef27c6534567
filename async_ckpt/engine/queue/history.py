"""What the saves of one service came to, as far as its deletions have to know (D3).

Guarantees: a failure counts until its location is saved or removed; a durable checkpoint counts until somebody begins
to remove it. What can no longer make a difference is forgotten.

What does not belong here: what is under way (queue).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from heapq import heappop, heappush

from async_ckpt.engine.queue.names import Names, lies_in

__all__ = ["History"]


class History:
    """Failures and durable checkpoints, by location and number of the operation."""

    def __init__(self) -> None:
        self._failed: dict[int, tuple[Hashable, str]] = {}
        self._failed_at: Names[Hashable] = Names()
        self._last_failed: list[int] = []  # a heap of negative numbers; some are forgotten
        self._durable: dict[int, str] = {}
        self._durable_at: Names[str] = Names()
        self._in_order: list[int] = []  # numbers of durable ones; some have gone

    @property
    def last_failure(self) -> int:
        """The number of the newest operation that failed, 0 where none counts."""
        while self._last_failed and -self._last_failed[0] not in self._failed:
            heappop(self._last_failed)
        return -self._last_failed[0] if self._last_failed else 0

    def failure(self, kind: Hashable, key: str) -> int | None:
        """Return the number of the one of *kind* that failed last at *key*, ``None`` where none counts."""
        return next((number for number, of in self._failed_at.at(key).items() if of is kind), None)

    def failed(self, kind: Hashable, key: str, number: int) -> None:
        """Note that one of *kind* failed at *key*."""
        self._forget_older_failure(kind, key)
        self._failed[number] = kind, key
        self._failed_at.add(key, number, kind)
        heappush(self._last_failed, -number)

    def succeeded(self, kind: Hashable, key: str, number: int) -> None:
        """Note that one of *kind* took effect at *key*: an older failure there counts no longer."""
        if self._failed and (self.failure(kind, key) or number) < number:
            self._forget_older_failure(kind, key)

    def forget_failures(self, key: str) -> None:
        """Note that the program counts no longer on what it saved at *key*, or in it."""
        if not self._failed:
            return
        for number in [*self._failed_at.at(key), *self._failed_at.below(key)]:
            self._forget_failure(number)

    def durable(self, key: str, number: int) -> None:
        """Note that a checkpoint is at *key*."""
        for older in list(self._durable_at.at(key)):
            self._forget_durable(older)
        self._durable[number] = key
        self._durable_at.add(key, number, key)
        insort(self._in_order, number)

    def removed(self, key: str) -> None:
        """Note that nothing may be at *key*, or in it, any more."""
        if not self._durable:
            return
        for number in [*self._durable_at.at(key), *self._durable_at.below(key)]:
            self._forget_durable(number)

    def has_newer_checkpoint(self, failure: int, *, without: str) -> bool:
        """Return whether a checkpoint newer than *failure* is durable, other than those at *without*, or in it."""
        if not failure:
            return True
        for number in reversed(self._in_order):
            if number < failure:
                return False
            key = self._durable.get(number)
            if key is not None and not lies_in(key, without):
                return True
        return False

    def forget_before(self, number: int) -> None:
        """Forget what is durable and older than whatever may fail from now on, unless something has failed."""
        if self._failed or not self._in_order:
            return
        older = bisect_left(self._in_order, number)
        for each in self._in_order[:older]:
            self._forget_durable(each)
        del self._in_order[:older]

    def _forget_older_failure(self, kind: Hashable, key: str) -> None:
        number = self.failure(kind, key)
        if number is not None:
            self._forget_failure(number)

    def _forget_failure(self, number: int) -> None:
        _, key = self._failed.pop(number)
        self._failed_at.discard(key, number)

    def _forget_durable(self, number: int) -> None:
        key = self._durable.pop(number, None)
        if key is not None:
            self._durable_at.discard(key, number)
            if len(self._in_order) > 2 * len(self._durable) + 64:
                self._in_order = sorted(self._durable)
