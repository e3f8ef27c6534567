"""The barrier at which the ranks of one fit leave it: together, and with the same outcome.

When training has ended, the first rank waits for its pending checkpoints. The other ranks have none; without a barrier
they would go on, and load files that do not exist yet. So they wait, in ``on_train_end``, until the first rank
announces the outcome. Every rank gets there after training's last collective operation. The first rank goes on when all
others have left.

Guarantees: no collective operation is called. A rank with an error in flight waits for no other, and the first rank
waits for none if it fails in the middle of training. The others give up when the first rank's process has ended, or
nothing has moved for ``flush_timeout`` and a minute; the first rank gives up after a minute. Every other rank raises
the first rank's failure once, after the first rank has cleaned up: a launcher ends all ranks when one fails.

What does not belong here: waiting for storage (flushing), and what is pending (group_pending).
"""

from __future__ import annotations

import json
import logging
from typing import Any

from async_ckpt.errors import FlushTimeoutError, RankError
from async_ckpt.lightning.group_pending import GroupPending, pending_of_group, read
from async_ckpt.telemetry.patience import Limit

__all__ = ["ExitBarrier", "exit_barrier_of"]

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 60.0


class ExitBarrier:
    """The barrier of one fit, on one rank; made when the fit begins, on every rank.

    Args:
        pending: the requests of the group's ranks.
        limit: how long the first rank waits for its pending checkpoints.
        grace_seconds: how much longer the others wait, and how long the first rank waits for them.
    """

    def __init__(self, pending: GroupPending, *, limit: Limit, grace_seconds: float = _GRACE_SECONDS) -> None:
        self._pending = pending
        self._store = pending.store
        self._limit = limit
        self._grace_seconds = grace_seconds
        fit = f"async_ckpt/fits/{pending.next_fit()}"
        self._outcome_key, self._left_key = f"{fit}/word", f"{fit}/left"
        pending.can_ask()  # connects now, while all ranks are there
        self._has_announced = self._has_ended = self._has_left = False

    def training_ended(self) -> None:
        """Note that training has ended: every rank gets here, unless it fails."""
        self._has_ended = True

    def wait_for_first_rank(self) -> None:
        """On the first rank, announce that everything is durable; on the others, wait for that.

        Raises:
            RankError: the first rank failed, or its process ended.
            FlushTimeoutError: the first rank announces nothing, and nothing moves.
        """
        if self._store.rank == 0:
            self._announce(None)
            return
        if not self._pending.can_ask():
            logger.warning(
                "the first rank has ended already, so it is unknown whether its last checkpoints are durable"
            )
            return
        limit = Limit(
            idle_seconds=self._limit.idle_seconds + self._grace_seconds,
            total_seconds=self._limit.total_seconds + self._grace_seconds,
        )
        outcome = self._pending.poll(
            lambda store: read(store, self._outcome_key), "checkpoints to wait for", limit=limit
        )
        failure = json.loads(outcome)
        if failure is not None:
            self._pending.count_as_raised()
            raise RankError(f"rank 0, which writes the checkpoints, failed: {failure}")

    def leave(self, *, failure: str | None, waits: bool) -> None:
        """Leave the fit; the first rank lets the others go, and waits until they have left.

        Args:
            failure: the first rank's failure to write, if there is one.
            waits: whether the first rank may wait for the others.
        """
        if self._has_left:
            return
        self._has_left = True
        if self._store.rank != 0:
            self._pending.ask_quietly(lambda store: store.add(self._left_key, 1))
            return
        self._announce(failure)
        if waits and self._has_ended:
            self._wait_for_others()

    def _announce(self, failure: str | None) -> None:
        if not self._has_announced:
            self._has_announced = True
            self._pending.ask_quietly(lambda store: store.set(self._outcome_key, json.dumps(failure)))

    def _wait_for_others(self) -> None:
        others = self._store.world_size - 1

        def look(store: Any) -> bool | None:
            if store.add(self._left_key, 0) < others:
                return None
            for key in (
                self._outcome_key,
                self._left_key,
            ):  # otherwise they would remain as long as the group
                store.delete_key(key)
            return True

        try:
            self._pending.poll(look, "to leave the fit", limit=Limit.hard(self._grace_seconds))
        except FlushTimeoutError:
            logger.warning(
                "not every rank has left the fit after %g s; the first rank goes on", self._grace_seconds
            )
        except RankError as error:  # the group's store is elsewhere, and has gone
            logger.debug("%s", error)


def exit_barrier_of(trainer: Any, limit: Limit) -> ExitBarrier | None:
    """Return the barrier for the ranks of *trainer*; ``None`` if there is only one."""
    pending = pending_of_group()
    if pending is None:
        return None
    store = pending.store
    if (trainer.global_rank, trainer.world_size) != (store.rank, store.world_size):  # some ranks only, or one
        return None
    return ExitBarrier(pending, limit=limit)
