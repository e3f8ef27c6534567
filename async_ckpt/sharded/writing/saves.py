"""The sharded saves of one service: their numbers, and what the other ranks are told if one cannot take place.

Guarantees: the n-th call on each rank is the n-th save of the group (O4). If a call raises before anything was
accepted, or a save ends in the queue before its turn, the other ranks are told at once (E4, E5).

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
        rendezvous: with the other ranks.
    """

    @classmethod
    def open(cls, process_group: Any, store: Any, options: ServiceOptions) -> ShardedSaves:
        """Return the saves of this rank of *process_group*; see ``CheckpointService``."""
        return cls(Rendezvous.open(process_group, store, options))

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rendezvous = rendezvous
        self._plans = Plans()
        self._numbers = count(
            1
        )  # in one step, and without a lock: a signal handler may save at any line (L1)

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
            location: a directory.
            resources: of the service.
            submit: queues what is written by the writer that it is given.
            extras: values to have files of their own, by name; see `ShardedWriter`.

        Returns:
            The handle, and the writer, which the handle's end leaves nothing to do.

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
            self.rendezvous.fail(number, _why(error))
            raise

        def tell(ended: Handle) -> None:
            if not writer.has_begun:  # else they know
                error = ended._outcome.exception()
                self.rendezvous.fail(number, f"{ended.state.value}" if error is None else _why(error))

        handle.add_done_callback(tell)
        return handle, writer

    def refuse(self, error: Exception) -> None:
        """Tell the other ranks of a call that failed before anything was queued; it counts as one of the saves (O4)."""
        self.rendezvous.fail(next(self._numbers), _why(error))


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
