"""Which failed saves of all ranks are raised at a later one: those that the first rank knows of, and on every rank.

A verdict reaches the ranks one after the other. Where each raised what it knows, one would leave training while another
goes on into a collective operation, and waits there for it. So the first rank says what it knows, with the path, which
Lightning has it say anyway.

What does not belong here: raising a rank's own failures (the service's).
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from async_ckpt.errors import RankError
from async_ckpt.handle import Handle

__all__ = ["SharedFailures", "Told"]


class Told(NamedTuple):
    """What the first rank knows of, and has not raised yet.

    Attributes:
        number: of the newest save of all ranks that has failed; 0 for none.
        failure: what has failed on that rank alone.
    """

    number: int
    failure: str


class SharedFailures:
    """The saves that this rank has made with all others, and which of them have failed."""

    def __init__(self) -> None:
        self._count = 0
        self._handles: dict[int, Handle] = {}

    def add(self, handle: Handle) -> None:
        """Take in a save; on every rank in the same order."""
        self._count += 1
        self._handles[self._count] = handle
        for number, each in list(self._handles.items()):
            if each.done() and not _is_untold(each):
                self._handles.pop(number, None)

    def known(self, others: str) -> Told | None:
        """Return what this rank, the first one, has to tell, if anything.

        Args:
            others: what else has failed here.
        """
        failed = [number for number, handle in list(self._handles.items()) if _is_untold(handle)]
        return Told(max(failed, default=0), others) if failed or others else None

    def up_to(self, told: Told) -> list[Handle]:
        """Return the saves that end, if they have not yet, as those did that the first rank knows of."""
        return [handle for number, handle in list(self._handles.items()) if number <= told.number]

    def raise_others(self, told: Told) -> None:
        """Raise on this rank what the first rank alone has failed with, unless an error is in flight.

        Raises:
            RankError: there is such a failure.
        """
        if told.failure and not told.number and sys.exc_info()[1] is None:
            raise RankError(f"rank 0, which removes the checkpoints, failed: {told.failure}")


def _is_untold(handle: Handle) -> bool:
    return handle._failure is not None and not handle._failure.is_reported
