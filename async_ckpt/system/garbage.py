"""Holds Python's garbage collector back while very many objects are made at once.

The collector runs after a certain number of new objects. When a quarter of all objects are new, it visits every object
of the program. That takes a tenth of a second or more with the GIL held, and training stands still. The descriptions of
thousands of tensors are such new objects, and none of them is in a cycle.

Guarantees: the program's own settings are restored at the end of the body, even if Ctrl-C raises in it. If Ctrl-C
raises just before or after the body, they are restored at the end of the next body at the latest. A child that is
forked meanwhile has them at once. Objects that are not in a cycle are freed as usual.

What does not belong here: the decision where this is worthwhile.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_held_back"]

_NEVER = 2_147_483_629
"""A threshold that is never reached, and that no program sets by chance: a prime just below the largest one."""

_usual = gc.get_threshold()  # what the program has set


@contextmanager
def collector_held_back() -> Iterator[None]:
    """Keep the collector from running by itself; only for moments, because garbage in cycles accumulates meanwhile.

    If two bodies overlap, the collector runs again as soon as one of them has ended. ``gc.disable`` and ``gc.collect``
    work as usual; a threshold that is set in the body is lost.
    """
    global _usual
    before = gc.get_threshold()
    # Otherwise, another thread is in such a body, or Ctrl-C kept one from restoring the settings.
    if before[0] != _NEVER:
        _usual = before
    try:
        gc.set_threshold(_NEVER, *before[1:])
        yield
    finally:
        # The first call, because Python handles signals after each call. If one raised before this line, the end of the
        # generator executes it.
        gc.set_threshold(*_usual)


def _restore_in_child() -> None:
    if gc.get_threshold()[0] == _NEVER:
        gc.set_threshold(*_usual)


os.register_at_fork(after_in_child=_restore_in_child)
