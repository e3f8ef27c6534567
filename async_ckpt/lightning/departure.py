"""How the ranks of one fit leave it: together, and with the same answer.

When training has ended, the first rank waits for the checkpoints that it has pending. The others, which have none,
would go on meanwhile, to load what is not there yet. So they wait for the first rank's word, in ``on_train_end``, to
which every rank comes after training's last collective operation; and the first rank goes on when all have left.

Guarantees: no collective operation is called. A rank in which an error is on its way waits for nobody, and the first
rank waits for none that it left in the middle of training. Whoever waits gives up when the first rank has ended, or
nothing has moved for ``flush_timeout`` and a minute; the first rank, after a minute. What the first rank failed
with, each other rank raises once, when the first one has cleaned up: a launcher ends all when one ends with an error.

What does not belong here: waiting for storage (flushing), and what is pending (group_pending).
"""

from __future__ import annotations

import json
import logging
from typing import Any

from async_ckpt.errors import FlushTimeoutError, RankError
from async_ckpt.lightning.group_pending import GroupPending, pending_of_group, read
from async_ckpt.telemetry.patience import Limit

__all__ = ["Departure", "departure_of"]

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0


class Departure:
    """The end of one fit, on one rank; made when the fit begins, on every rank.

    Args:
        pending: of the group.
        limit: how long the first rank waits for what it has pending.
        grace_seconds: how much longer the others do, and how long the first rank waits for them.
    """

    def __init__(self, pending: GroupPending, *, limit: Limit, grace_seconds: float = _GRACE_SECONDS) -> None:
        self._pending = pending
        self._store = pending.store
        self._limit = limit
        self._grace_seconds = grace_seconds
        fit = f"async_ckpt/fits/{pending.next_fit()}"
        self._word, self._left = f"{fit}/word", f"{fit}/left"
        pending.can_ask()  # connects, while all are there
        self._has_spoken = self._has_ended = self._has_left = False

    def training_ended(self) -> None:
        """Know that every rank comes here, to the end of training, unless an error keeps it."""
        self._has_ended = True

    def agree(self) -> None:
        """On the first rank: all is durable, and the others hear so. On those: wait for that.

        Raises:
            RankError: the first rank has failed, or ended without a word.
            FlushTimeoutError: it says nothing, and nothing moves.
        """
        if self._store.rank == 0:
            self._speak(None)
            return
        if not self._pending.can_ask():
            logger.warning(
                "the first rank has ended already; what became of its last checkpoints is not known"
            )
            return
        limit = Limit(
            idle_seconds=self._limit.idle_seconds + self._grace_seconds,
            total_seconds=self._limit.total_seconds + self._grace_seconds,
        )
        word = self._pending.poll(
            lambda store: read(store, self._word), "checkpoints to wait for", limit=limit
        )
        failure = json.loads(word)
        if failure is not None:
            self._pending.count_as_told()
            raise RankError(f"rank 0, which writes the checkpoints, failed: {failure}")

    def leave(self, *, failure: str | None, waits: bool) -> None:
        """Leave the fit; the first rank lets those go that wait for it, and sees them leave.

        Args:
            failure: what the first rank ends with, if it has failed to write.
            waits: whether it may wait for the others.
        """
        if self._has_left:
            return
        self._has_left = True
        if self._store.rank != 0:
            self._pending.ask_quietly(lambda store: store.add(self._left, 1))
            return
        self._speak(failure)
        if waits and self._has_ended:
            self._see_others_leave()

    def _speak(self, failure: str | None) -> None:
        if not self._has_spoken:
            self._has_spoken = True
            self._pending.ask_quietly(lambda store: store.set(self._word, json.dumps(failure)))

    def _see_others_leave(self) -> None:
        others = self._store.world_size - 1

        def look(store: Any) -> bool | None:
            if store.add(self._left, 0) < others:
                return None
            for key in (self._word, self._left):  # they would stay as long as the group
                store.delete_key(key)
            return True

        try:
            self._pending.poll(look, "to leave the fit", limit=Limit.hard(self._grace_seconds))
        except FlushTimeoutError:
            logger.warning("not every rank has left the fit after %g s; going on", self._grace_seconds)
        except RankError as error:  # the group's store is elsewhere, and has gone
            logger.debug("%s", error)


def departure_of(trainer: Any, limit: Limit) -> Departure | None:
    """Return how the ranks of *trainer* will leave its fit; ``None`` where it is alone."""
    pending = pending_of_group()
    if pending is None:
        return None
    store = pending.store
    if (trainer.global_rank, trainer.world_size) != (store.rank, store.world_size):  # some ranks only, or one
        return None
    return Departure(pending, limit=limit)
