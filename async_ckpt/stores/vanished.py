"""Directories that were there when a save was asked for, and are gone when it is its turn: they are not made again.

Somebody has removed such a directory, as one removes a temporary one that was used; what is made again there would fill
the disk, and nobody would look for it. What this process has removed itself, as it was asked to or because a save that
had made it failed, does not count: a save that is accepted after a removal comes after it (O1).

What does not belong here: directories that were not there; those are made.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location

__all__ = ["refuse_vanished", "removing", "seen"]

_MOST = 4096  # that are kept in mind; a save waits behind far fewer

_removed: dict[str, float] = {}
"""By path, when this process last came to the end of removing it; infinite until then. The newest ones come last."""


@contextmanager
def removing(path: str) -> Iterator[None]:
    """Keep in mind that this process removes the directory *path* in the body.

    What is seen of it meanwhile, before its end, is seen of a directory that is about to go.
    """
    _note(path, math.inf)  # first: another save may look at any moment
    try:
        yield
    finally:
        _note(path, monotonic())


def _note(path: str, seconds: float) -> None:
    _removed.pop(path, None)
    _removed[path] = seconds
    while len(_removed) > _MOST:
        _removed.pop(next(iter(_removed)), None)


def seen(location: Location) -> Location:
    """Return a local *location*, which a save has just been asked for, with what is to be known of its directory."""
    if location.in_directory or os.path.isdir(os.path.dirname(location.path)):
        return replace(location, seen_seconds=monotonic())
    return location


def refuse_vanished(location: Location) -> None:
    """Refuse a save into a directory that somebody has removed since it was asked for.

    Args:
        location: where it is to go, ``seen_seconds`` included.

    Raises:
        StoreError: the directory was there, is gone, and it was not this process that has removed it.
    """
    directory = os.path.dirname(location.path)
    if location.seen_seconds is None or os.path.isdir(directory):
        return
    at = directory
    while True:
        if _removed.get(at, -1.0) >= location.seen_seconds:
            return
        if os.path.dirname(at) == at:
            break
        at = os.path.dirname(at)
    error = OSError(errno.ENOENT, "the directory has been removed since the save was asked for")
    raise StoreError.during(
        "begin", location.url, error, "It is not made again; wait for a save before that."
    )
