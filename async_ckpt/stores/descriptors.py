"""Descriptors that no forked child keeps: it would keep a dead parent's file locked, and the room of a deleted one.

Guarantees: what was opened here is closed in a child by the time that it runs, also where the fork came between the
opening and the noting of it, as long as the system shows what is open. What a child runs by ``exec`` has none of them.

What does not belong here: which files those are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from async_ckpt.stores.leftovers import is_leftover

__all__ = ["close", "opened"]

P = ParamSpec("P")

_open: set[int] = set()
_opening: set[object] = set()


def opened(function: Callable[P, int], /, *args: P.args, **kwargs: P.kwargs) -> int:
    """Return the descriptor, with O_CLOEXEC, that *function* opens, for `close`."""
    opening = object()
    _opening.add(opening)
    try:
        fd = function(*args, **kwargs)
        _open.add(fd)
    finally:
        _opening.discard(opening)
    return fd


def close(fd: int) -> None:
    """Close a descriptor."""
    _open.discard(fd)  # first: its number may be another file's at once
    os.close(fd)


def _close_in_child() -> None:
    while _open:
        with suppress(OSError):
            os.close(_open.pop())
    if _opening:  # by a thread of the parent's that had no time to say which
        _opening.clear()
        with suppress(OSError):
            for name in os.listdir("/proc/self/fd"):
                with suppress(OSError):
                    path = os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
                    if is_leftover(os.path.basename(path)):
                        os.close(int(name))


os.register_at_fork(after_in_child=_close_in_child)
