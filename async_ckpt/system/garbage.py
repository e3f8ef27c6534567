"""Holds Python's garbage collector back while very many objects are made at once.

The collector looks for cycles after so many new objects. Where a fourth of all objects is new it goes through the whole
program: a tenth of a second and more, with the GIL held, in which training stands still. Descriptions of thousands of
tensors are such objects, and none of them is in a cycle.

Guarantees: the program's own settings stand again at the end, also where Ctrl-C raises within; where it raises at the
very edge, at the end of the next such moment at the latest. A child that is forked meanwhile has them at once. Objects
that are in no cycle are freed as ever.

What does not belong here: when that pays.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_held_back"]

_NEVER = 2_147_483_629
"""New objects before the collector runs. The prime below the largest number there can be: nobody else sets that."""

_usual = gc.get_threshold()  # what the program has set


@contextmanager
def collector_held_back() -> Iterator[None]:
    """Have the collector not run by itself; for moments only, as garbage in cycles is kept meanwhile.

    Where two overlap, it runs again as soon as one is done. ``gc.disable`` and ``gc.collect`` do what they always do;
    what is given to ``gc.set_threshold`` meanwhile does not last.
    """
    global _usual
    before = gc.get_threshold()
    if (
        before[0] != _NEVER
    ):  # else another thread is within, or Ctrl-C came where one was about to set them back
        _usual = before
    try:
        gc.set_threshold(_NEVER, *before[1:])
        yield
    finally:
        # Not one call before: Python lets signals in after each. Where one came before this, the end of the generator
        # comes here.
        gc.set_threshold(*_usual)


def _set_back_in_child() -> None:
    if gc.get_threshold()[0] == _NEVER:
        gc.set_threshold(*_usual)


os.register_at_fork(after_in_child=_set_back_in_child)
