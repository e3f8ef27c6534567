"""How the saves of one service ended, as far as its removals depend on it (D3).

Guarantees: a failure counts until its location is saved or removed. A durable checkpoint counts until its removal
begins. Entries that no longer matter are forgotten.

What does not belong here: operations in progress (queue).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from heapq import heappop, heappush

from async_ckpt.engine.queue.names import Names, lies_in

__all__ = ["History"]


class History:
    """Failures and durable checkpoints, by location and id of the operation."""

    def __init__(self) -> None:
        self._failed: dict[int, tuple[Hashable, str]] = {}
        self._failed_at: Names[Hashable] = Names()
        self._last_failed: list[int] = []  # a heap of negated ids; some may be forgotten
        self._durable: dict[int, str] = {}
        self._durable_at: Names[str] = Names()
        self._in_order: list[int] = []  # ids of durable checkpoints; some may be removed

    @property
    def last_failure(self) -> int:
        """The id of the newest failure that counts, or 0."""
        while self._last_failed and -self._last_failed[0] not in self._failed:
            heappop(self._last_failed)
        return -self._last_failed[0] if self._last_failed else 0

    def failure(self, kind: Hashable, key: str) -> int | None:
        """Return the id of the last failure of *kind* at *key* that counts, or ``None``."""
        return next((number for number, of in self._failed_at.at(key).items() if of is kind), None)

    def failed(self, kind: Hashable, key: str, number: int) -> None:
        """Note that an operation of *kind* failed at *key*."""
        self._forget_older_failure(kind, key)
        self._failed[number] = kind, key
        self._failed_at.add(key, number, kind)
        heappush(self._last_failed, -number)

    def succeeded(self, kind: Hashable, key: str, number: int) -> None:
        """Note that an operation of *kind* succeeded at *key*: an older failure there no longer counts."""
        if self._failed and (self.failure(kind, key) or number) < number:
            self._forget_older_failure(kind, key)

    def forget_failures(self, key: str) -> None:
        """Forget failures at *key* and below it, as the program removes what it saved there."""
        if not self._failed:
            return
        for number in [*self._failed_at.at(key), *self._failed_at.below(key)]:
            self._forget_failure(number)

    def durable(self, key: str, number: int) -> None:
        """Note that there is a durable checkpoint at *key*."""
        for older in list(self._durable_at.at(key)):
            self._forget_durable(older)
        self._durable[number] = key
        self._durable_at.add(key, number, key)
        insort(self._in_order, number)

    def removed(self, key: str) -> None:
        """Note that there may no longer be a checkpoint at *key*, or below it."""
        if not self._durable:
            return
        for number in [*self._durable_at.at(key), *self._durable_at.below(key)]:
            self._forget_durable(number)

    def has_newer_checkpoint(self, failure: int, *, without: str) -> bool:
        """Return whether a checkpoint newer than *failure* is durable, not counting those at *without* or below it."""
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
        """Forget durable checkpoints older than any operation that may still fail, unless a failure counts."""
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
