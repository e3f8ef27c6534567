"""Decides which failures of sharded saves are raised at a later save: those that the first rank knows, on every rank.

The ranks learn a verdict one after the other. If each raised what it knows, one could leave training while another
waits for it in a collective operation. So the first rank broadcasts what it knows, together with the path, which
Lightning broadcasts anyway.

A failure before a save is accepted is kept for the next save, too: a rank that raised it at once would not take part
in the collective operation after the save, in which the others wait.

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

__all__ = ["KnownFailures", "SharedFailures", "failed_here", "failed_on_this_rank"]

logger = logging.getLogger(__name__)


class KnownFailures(NamedTuple):
    """The failures that the first rank knows and has not raised yet.

    Attributes:
        number: the number of the newest save of all ranks that has failed; 0 if none has.
        failure: a description of what has failed only on the first rank; empty if nothing has.
    """

    number: int
    failure: str


class SharedFailures:
    """The saves that this rank has made together with all others."""

    def __init__(self) -> None:
        self._count = 0
        self._handles: dict[int, Handle] = {}

    def add(self, handle: Handle) -> None:
        """Add a save; every rank adds the same saves in the same order."""
        self._count += 1
        self._handles[self._count] = handle
        for number, each in list(self._handles.items()):
            if each.done() and not _is_unreported(each):
                self._handles.pop(number, None)

    def unreported(self, others: str) -> KnownFailures | None:
        """Return the failures that this rank, the first one, has not raised yet; ``None`` if there are none.

        Args:
            others: a description of other failures on this rank.
        """
        failed = [number for number, handle in list(self._handles.items()) if _is_unreported(handle)]
        return KnownFailures(max(failed, default=0), others) if failed or others else None

    def handles_up_to(self, known: KnownFailures) -> list[Handle]:
        """Return the saves up to the newest failure; they have ended, even if this rank does not know it yet."""
        return [handle for number, handle in list(self._handles.items()) if number <= known.number]

    def raise_others(self, known: KnownFailures) -> None:
        """Raise the failure that only the first rank had, unless an error is in flight.

        Raises:
            RankError: there is such a failure.
        """
        if known.failure and not known.number and sys.exc_info()[1] is None:
            raise RankError(f"rank 0 failed in something that only it does: {known.failure}")


def _is_unreported(handle: Handle) -> bool:
    return handle._failure is not None and not handle._failure.is_reported


def failed_here(service: CheckpointService, place: Location | str, error: Exception) -> Handle:
    """Return the handle of a request that failed before it was accepted; *error* is raised like any failure (E1).

    Args:
        service: the service that the request was made of.
        place: its location; as the caller wrote it, if that could not be parsed.
        error: the failure.
    """
    address, url = (place, redacted_url(place)) if isinstance(place, str) else (place.address, place.url)
    logger.error(
        "the save to %r failed: %s: %s; this will be raised at the next save, or at the end",
        url,
        type(error).__name__,
        error,
    )
    outcome: Outcome[Report] = Outcome()
    handle = Handle(address, outcome, shown_url=url)
    handle._state = State.FAILED
    handle._failure = Failure(handle, error)
    service.failures.add(handle._failure)
    outcome.set_exception(error)
    return handle


def failed_on_this_rank(service: CheckpointService, place: Location | str, error: Exception) -> Handle:
    """Like `failed_here`, for a save of all ranks: it fails on this rank with the same error as on the others (E4)."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if isinstance(place, str):
        shown = redacted_url(place)
    else:
        shown = place.path if is_local(place) else place.url
    failure = ShardedSaveError.of(shown, {rank: f"{type(error).__name__}: {error}"})
    failure.__cause__ = error
    return failed_here(service, place, failure)
