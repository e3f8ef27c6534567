"""File descriptors that are closed in forked children, which would otherwise keep locks and deleted files alive.

Guarantees: the descriptors are closed when a forked child begins to run, even if the fork came between opening and
registering one, as long as the system lists open descriptors. ``exec`` closes them, too.

What does not belong here: the files themselves.
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
    """Return the descriptor, with O_CLOEXEC, that *function* opens; close it with `close`."""
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
