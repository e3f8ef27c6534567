"""Which process this is, for what has to notice that it is in a forked child.

Guarantees: a child has another id than each of its ancestors, unlike those of the system: one that has ended leaves
its id to others, and in a container of its own a child may have its parent's.

What does not belong here: what a child does then.
"""

from __future__ import annotations

import os

__all__ = ["process_id"]

_BITS = 32  # of the system's ids
_forks = 0


def process_id() -> int:
    """Return the system's id of this process, and above it how many forks led here."""
    return os.getpid() + (_forks << _BITS)


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)
