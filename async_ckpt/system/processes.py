"""Identifies this process, for objects that have to notice that they are in a forked child.

Guarantees: a child's id differs from the ids of all its ancestors. The system's ids do not guarantee that: the id of an
ended process is reused, and a child in a container of its own may have its parent's id.

What does not belong here: reacting to a fork.
"""

from __future__ import annotations

import os

__all__ = ["process_id"]

_BITS = 32  # of the system's ids
_forks = 0


def process_id() -> int:
    """Return the process id, combined with the number of forks that led to this process."""
    return os.getpid() + (_forks << _BITS)


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)
