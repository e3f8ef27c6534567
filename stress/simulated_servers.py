"""The two servers of ``stress.scale``, in virtual time: one prefix of S3, and the host of the group's store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from async_ckpt.errors import ThrottledError

__all__ = ["Prefix", "StoreHost"]

_CALL_SECONDS = 30e-6  # of the store's host; 18 µs measured, and it is polled meanwhile
_ROUND_TRIP_SECONDS = 0.2e-3
_WRITES_PER_SECOND = 3500.0
_BURST = 350.0
_ANSWER_SECONDS = 0.03
_CONNECTION_BYTES_PER_SECOND = 125e6


class Prefix:
    """One prefix of a bucket, which accepts a limited number of writes per second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.refused = 0
        self._clock = clock
        self._left = _BURST
        self._at = clock()

    async def write(self, nbytes: int) -> None:
        """Write *nbytes* bytes.

        Raises:
            ThrottledError: there were too many writes.
        """
        now = self._clock()
        self._left = min(_BURST, self._left + (now - self._at) * _WRITES_PER_SECOND)
        self._at = now
        if self._left < 1:
            self.refused += 1
            await asyncio.sleep(_ANSWER_SECONDS)
            raise ThrottledError("SlowDown: please reduce your request rate")
        self._left -= 1
        await asyncio.sleep(_ANSWER_SECONDS + nbytes / _CONNECTION_BYTES_PER_SECOND)


class StoreHost:
    """The host of the group's store, which serves one call at a time."""

    def __init__(self, clock: Callable[[], float], world: int, chance: Random) -> None:
        self._clock = clock
        self._chance = chance
        self._free_at = 0.0
        self.pause_seconds = max(0.02, world / 20_000)

    def delay(self, calls: int) -> float:
        """Return the seconds until *calls* calls are done and the next poll sees their result."""
        now = self._clock()
        self._free_at = max(self._free_at, now) + calls * _CALL_SECONDS
        return self._free_at - now + _ROUND_TRIP_SECONDS + self._chance.random() * self.pause_seconds
