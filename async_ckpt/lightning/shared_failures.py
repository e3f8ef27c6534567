"""Which failed saves of all ranks are raised at a later one: those that the first rank knows of, and on every rank.

A verdict reaches the ranks one after the other. Where each raised what it knows, one would leave training while another
goes on into a collective operation, and waits there for it. So the first rank says what it knows, with the path, which
Lightning has it say anyway.

What a save fails with before it is accepted is kept likewise: the rank that raised it at once would not come to the
collective operation after the save, for which the others wait.

What does not belong here: raising a rank's own failures (the service's).
"""

from __future__ import annotations

import logging
import sys
from typing import NamedTuple

from async_ckpt.errors import RankError, ShardedSaveError
from async_ckpt.handle import Failure, Handle, Outcome, Report, State
from async_ckpt.service import CheckpointService
from async_ckpt.stores import is_local
from async_ckpt.stores.base import Location
from async_ckpt.stores.redaction import redacted_url

__all__ = ["SharedFailures", "Told", "failed_here", "failed_on_this_rank"]

logger = logging.getLogger(__name__)


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
            raise RankError(f"rank 0 failed in what no other rank does: {told.failure}")


def _is_untold(handle: Handle) -> bool:
    return handle._failure is not None and not handle._failure.is_reported


def failed_here(service: CheckpointService, place: Location | str, error: Exception) -> Handle:
    """Return the handle of a request that *error* has ended before it was accepted; raised like other failures (E1).

    Args:
        service: whose request it was.
        place: where to; as the caller wrote it, where it could not be located.
        error: what is raised.
    """
    address, url = (place, redacted_url(place)) if isinstance(place, str) else (place.address, place.url)
    logger.error("%r: %s: %s; raised at the next save, or at the end", url, type(error).__name__, error)
    outcome: Outcome[Report] = Outcome()
    handle = Handle(address, outcome, shown_url=url)
    handle._state = State.FAILED
    handle._failure = Failure(handle, error)
    service.failures.add(handle._failure)
    outcome.set_exception(error)
    return handle


def failed_on_this_rank(service: CheckpointService, place: Location | str, error: Exception) -> Handle:
    """Return the like for a save of all ranks: it fails here as it does on the others (E4)."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if isinstance(place, str):
        shown = redacted_url(place)
    else:
        shown = place.path if is_local(place) else place.url
    failure = ShardedSaveError.of(shown, {rank: f"{type(error).__name__}: {error}"})
    failure.__cause__ = error
    return failed_here(service, place, failure)
