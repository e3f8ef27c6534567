"""What will exist once a plugin's pending requests have ended, for code that asks before they have.

Guarantees: a request counts from the call on until it has ended, however it ends; a link, pending or on the disk, is
seen through as ``os.path.exists`` sees through it.

What does not belong here: what is asked of the service (session).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from async_ckpt.handle import Handle
from async_ckpt.stores import is_local, locate_local
from async_ckpt.stores.base import Location

__all__ = ["Prospects"]

_FEW = 64  # nobody looks for what has ended before there are more, and more than before
_MOST_LINKS = 40  # that lead one to another; as the kernel has it


@dataclass(eq=False, slots=True, kw_only=True)
class _Prospect:
    """What one request will make of its location; not the handle, whose error would keep what its frames hold.

    Attributes:
        there: whether anything will be.
        target: what it will lead to, where it is to be a link.
    """

    there: bool
    target: Location | None
    has_ended: bool = False

    def end(self, _: Handle) -> None:
        """It has come true, or not."""
        self.has_ended = True


class Prospects:
    """Of one plugin's requests, by location."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Prospect] = {}
        self._most = _FEW

    def add(self, place: Location, handle: Handle, *, there: bool, target: Location | None = None) -> None:
        """Take in a request, which stands for those before it of its *place*."""
        # A signal handler may come in between, and do the same. Not each time: there may be thousands.
        if len(self._by_key) >= self._most:
            for key, earlier in list(self._by_key.items()):
                if earlier.has_ended:
                    self._by_key.pop(key, None)
            self._most = 2 * len(self._by_key) + _FEW
        self._by_key[place.key] = prospect = _Prospect(there=there, target=target)
        handle.add_done_callback(prospect.end)

    def will_exist(self, place: Location, leaves: Callable[[str], bool]) -> bool | None:
        """Return whether there will be a file or directory at *place*; ``None`` where no request decides it.

        Args:
            place: of the name itself.
            leaves: tells of a location's key whether its removal is about to be asked for.
        """
        decided = False
        for _ in range(_MOST_LINKS):
            prospect = self._by_key.get(place.key)
            if prospect is not None and prospect.has_ended:
                prospect = None
            if leaves(place.key) or (prospect is not None and not prospect.there):
                return False
            target = _target_on_disk(place) if prospect is None else prospect.target
            if target is None:
                if prospect is not None:
                    return True
                return os.path.exists(place.path) if decided else None
            place, decided = target, decided or prospect is not None
        return False


def _target_on_disk(place: Location) -> Location | None:
    if not is_local(place) or not os.path.islink(place.path):
        return None
    return locate_local(os.path.join(os.path.dirname(place.path), os.readlink(place.path)), follow=False)
