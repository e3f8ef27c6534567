"""Numbers the sharded saves of one service, and tells the other ranks of a save that this rank cannot begin.

Guarantees: the n-th call on each rank is the n-th save of the group (O4). If a call raises, or its save ends while it
is still queued, the other ranks are told at once (E4, E5).

What does not belong here: the agreement itself (`rendezvous`), what is written (`writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from async_ckpt.engine.resources import Resources
from async_ckpt.engine.writers import StreamingWriter
from async_ckpt.handle import Handle
from async_ckpt.options import ServiceOptions
from async_ckpt.sharded.agreement.rendezvous import Rendezvous
from async_ckpt.sharded.writing.plans import Plans
from async_ckpt.sharded.writing.writer import ShardedWriter
from async_ckpt.stores.base import Location

__all__ = ["ShardedSaves"]


class ShardedSaves:
    """The saves of one service on one rank.

    Args:
        rendezvous: connects it with the other ranks.
    """

    @classmethod
    def open(cls, process_group: Any, store: Any, options: ServiceOptions) -> ShardedSaves:
        """Return the saves of this rank of *process_group*; see ``CheckpointService``."""
        return cls(Rendezvous.open(process_group, store, options))

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rendezvous = rendezvous
        self._plans = Plans()
        # Takes a number in one step and without a lock, because a signal handler may save at any line (L1).
        self._numbers = count(1)

    def save(
        self,
        location: Location,
        resources: Resources,
        submit: Callable[[ShardedWriter], Handle],
        *,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Handle, ShardedWriter]:
        """Queue a save.

        Args:
            location: of the directory.
            resources: of the service.
            submit: queues a save that uses the given writer.
            extras: values that get files of their own, by name; see `ShardedWriter`.

        Returns:
            The handle of the save, and its writer.

        Raises:
            Exception: nothing was accepted, and the save fails on all ranks.
        """
        number = next(self._numbers)
        try:
            store = resources.store(location)
            writer = ShardedWriter(
                StreamingWriter(store, resources.workers, resources.options),
                store=store,
                workers=resources.workers,
                rendezvous=self.rendezvous,
                plans=self._plans,
                number=number,
                overwrite=resources.options.overwrite,
                extras=extras,
            )
            handle = submit(writer)
        except BaseException as error:
            self.rendezvous.fail(number, _reason(error))
            raise

        def report(ended: Handle) -> None:
            if not writer.has_begun:  # otherwise the agreement has told them
                error = ended._outcome.exception()
                self.rendezvous.fail(number, f"{ended.state.value}" if error is None else _reason(error))

        handle.add_done_callback(report)
        return handle, writer

    def refuse(self, error: Exception) -> None:
        """Tell the other ranks of a call that failed before anything was queued; it counts as one of the saves (O4)."""
        self.rendezvous.fail(next(self._numbers), _reason(error))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
