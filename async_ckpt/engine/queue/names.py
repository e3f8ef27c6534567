"""An index of things by location: finds those at a location, above it, and below it.

Guarantees: a lookup costs time in proportion to the depth of the location, not to the number of things. Results are in
the order of addition.

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
    """Return the locations that *key* lies in, innermost first."""
    end = key.rfind("/")
    return _from(key[:end]) if end > 0 else ()


@lru_cache(maxsize=4096)
def _from(place: str) -> tuple[str, ...]:
    """Return *place* and the locations that it lies in, innermost first."""
    places = []
    end = len(place)
    while end > 0:
        places.append(place[:end])
        end = place.rfind("/", 0, end)
    return tuple(places)


class Names(Generic[T]):
    """Things with a number, by the location that each concerns."""

    def __init__(self) -> None:
        # OrderedDict, as finding the first item stays cheap after many have been removed.
        self._at: dict[str, OrderedDict[int, T]] = {}
        self._below: dict[str, OrderedDict[int, T]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._at)

    def add(self, key: str, number: int, item: T) -> None:
        """Add *item*."""
        _add(self._at, key, number, item)
        for place in _above(key):
            _add(self._below, place, number, item)

    def discard(self, key: str, number: int) -> None:
        """Remove an item; do nothing if it is not there."""
        if _discard(self._at, key, number):
            for place in _above(key):
                _discard(self._below, place, number)

    def at(self, key: str) -> OrderedDict[int, T]:
        """Return the items at *key*, by number."""
        return self._at.get(key, _NOTHING)

    def above(self, key: str) -> Iterator[OrderedDict[int, T]]:
        """Yield the items at each location that *key* lies in."""
        for place in _above(key):
            if place in self._at:
                yield self._at[place]

    def below(self, key: str) -> OrderedDict[int, T]:
        """Return the items at locations that lie in *key*, by number."""
        return self._below.get(key, _NOTHING)

    def related(self, key: str) -> list[OrderedDict[int, T]]:
        """Return the items at, above and below *key*, without empty results."""
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
    """Remove an item; return whether it was there."""
    found = index.get(key)
    if found is None or found.pop(number, None) is None:
        return False
    if not found:
        del index[key]
    return True
