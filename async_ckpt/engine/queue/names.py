"""Which of many things concern a location: those at it, those it lies in, and those that lie in it.

Guarantees: each question costs as much as the location is deep, and what is found is in the order in which it came,
however many things there are.

What does not belong here: what a location is called (stores).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Generic, TypeVar

__all__ = ["Names", "lies_in"]

T = TypeVar("T")

_NOTHING: OrderedDict[int, Any] = OrderedDict()


def lies_in(key: str, place: str) -> bool:
    """Return whether *key* is *place*, or a location in it."""
    return key == place or (key.startswith(place) and key[len(place)] == "/")


def _above(key: str) -> tuple[str, ...]:
    """Return what *key* lies in, innermost first."""
    end = key.rfind("/")
    return _from(key[:end]) if end > 0 else ()


@lru_cache(maxsize=4096)
def _from(place: str) -> tuple[str, ...]:
    """Return *place* and what it lies in, innermost first."""
    places = []
    end = len(place)
    while end > 0:
        places.append(place[:end])
        end = place.rfind("/", 0, end)
    return tuple(places)


class Names(Generic[T]):
    """Things with a number, by the location that each concerns."""

    def __init__(self) -> None:
        # Ordered ones, where to find the first stays cheap when many before it have gone.
        self._at: dict[str, OrderedDict[int, T]] = {}
        self._below: dict[str, OrderedDict[int, T]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._at)

    def add(self, key: str, number: int, item: T) -> None:
        """Take in *item*."""
        _add(self._at, key, number, item)
        for place in _above(key):
            _add(self._below, place, number, item)

    def discard(self, key: str, number: int) -> None:
        """Let go of what `add` was given; where there is no such thing, do nothing."""
        if _discard(self._at, key, number):
            for place in _above(key):
                _discard(self._below, place, number)

    def at(self, key: str) -> OrderedDict[int, T]:
        """Return what concerns the location itself, by number."""
        return self._at.get(key, _NOTHING)

    def above(self, key: str) -> Iterator[OrderedDict[int, T]]:
        """Yield what concerns each of the locations that *key* lies in."""
        for place in _above(key):
            if place in self._at:
                yield self._at[place]

    def below(self, key: str) -> OrderedDict[int, T]:
        """Return what concerns the locations that lie in *key*, by number."""
        return self._below.get(key, _NOTHING)

    def related(self, key: str) -> list[OrderedDict[int, T]]:
        """Return all of these, location by location, but for those where there is nothing."""
        at = self._at
        if not at:
            return []
        found = [at[key]] if key in at else []
        for place in _above(key):
            if place in at:
                found.append(at[place])
        if key in self._below:
            found.append(self._below[key])
        return found


def _add(index: dict[str, OrderedDict[int, T]], key: str, number: int, item: T) -> None:
    found = index.get(key)
    if found is None:
        found = index[key] = OrderedDict()
    found[number] = item


def _discard(index: dict[str, OrderedDict[int, T]], key: str, number: int) -> bool:
    """Let go of it; return whether it was there."""
    found = index.get(key)
    if found is None or found.pop(number, None) is None:
        return False
    if not found:
        del index[key]
    return True
