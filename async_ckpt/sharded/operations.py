"""The sharded operations of one service, on the caller's thread: saves, loads and consolidations.

Guarantees: the ranks' saves are numbered in the order of the calls (O4), even if a signal handler interrupts the first
one (L1). Loads and consolidations wait for the pending saves of what they read (O2).

What does not belong here: how each is done (`writing`, `reading`, `consolidating`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from async_ckpt.engine.resources import Resources
from async_ckpt.engine.submission import Submission
from async_ckpt.engine.writers import Writer
from async_ckpt.errors import OptionError
from async_ckpt.handle import Handle
from async_ckpt.options import ServiceOptions
from async_ckpt.sharded.consolidating import consolidation
from async_ckpt.sharded.reading.load import Loading
from async_ckpt.sharded.writing.saves import ShardedSaves
from async_ckpt.stores import check_target
from async_ckpt.stores.base import Content, Location

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner

    from async_ckpt.sharded.writing.writer import ShardedWriter

__all__ = ["SavingRanks", "consolidate", "load"]


class Streaming(Protocol):
    """What `consolidate` needs of the service that writes the file."""

    def stream(self, content: Content, location: Location) -> None:
        """Write *content* to *location*, and return when it is durable."""


class SavingRanks:
    """The sharded saves of one service, and the ranks that make them together.

    Args:
        process_group: the ranks; see ``CheckpointService``.
        store: through which they communicate; see ``CheckpointService``.
        options: of the service.
    """

    def __init__(self, process_group: Any, store: Any, options: ServiceOptions) -> None:
        self._group = process_group, store
        self._options = options
        self._saves: ShardedSaves | None = None
        self._is_opening = False

    def save(
        self,
        submission: Submission,
        state: Mapping[str, Any],
        location: Location,
        *,
        extras: Mapping[str, Any] | None,
    ) -> tuple[Handle, ShardedWriter]:
        """Submit a save; see ``CheckpointService.submit_sharded``."""
        if self._options.overflow == "supersede":
            raise OptionError(
                "overflow='supersede': each rank would decide by itself which sharded save is dropped; "
                "use 'block' or 'raise'"
            )

        def submit(writer: Writer) -> Handle:
            return submission.save(state, location, writer, share_unpicklable=False, tell=False)

        resources = submission.resources
        return self._opened(resources).save(location, resources, submit, extras=extras)

    def refuse(self, resources: Resources, error: Exception) -> None:
        """Tell the other ranks that the next save fails on this one, before there is a location (O4)."""
        self._opened(resources).refuse(error)

    def _opened(self, resources: Resources) -> ShardedSaves:
        if self._saves is None:
            if self._is_opening:  # a second one would be unknown to the other ranks (O4)
                raise RuntimeError(
                    "this signal handler interrupted the service's first sharded save; save after the handler"
                )
            self._is_opening = True
            try:
                if self._saves is None:  # a signal handler may have opened them just now
                    saves = ShardedSaves.open(*self._group, self._options)
                    resources.attached["rendezvous"] = saves.rendezvous
                    self._saves = saves
            finally:
                self._is_opening = False
        return self._saves


def load(
    submission: Submission,
    state: MutableMapping[str, Any],
    location: Location,
    *,
    strict: bool,
    weights_only: bool,
    planner: LoadPlanner | None,
) -> None:
    """Fill *state*; see ``CheckpointService.load_sharded``."""
    loading = Loading.of(submission.resources, location)
    submission.read(
        location, partial(loading.load, state, strict=strict, weights_only=weights_only, planner=planner)
    )


def consolidate(
    submission: Submission,
    source: Location,
    target: Location,
    writing_service: Callable[[int, int], AbstractContextManager[Streaming]],
    *,
    weights_only: bool,
) -> None:
    """Make one file from a directory; see ``CheckpointService.consolidate``.

    Args:
        submission: of the service that reads.
        source: the directory.
        target: the file.
        writing_service: makes the service that writes, from its ``part_size`` and its ``max_concurrent_parts``. It has
            threads of its own, because they wait for the bytes that the threads of the reading service fetch.
        weights_only: as for ``torch.load``.
    """
    options = submission.resources.options
    if target.key == source.key:
        raise OptionError(f"{source.url!r} is the checkpoint itself; give the file another name")
    check_target(target, in_place=options.in_place == "allow")
    loading = Loading.of(submission.resources, source)

    def write(content: Content) -> None:
        part_size = min(options.part_size_bytes, consolidation.PART_BYTES)
        at_a_time = consolidation.parts_at_a_time(content.nbytes, options.max_concurrent_parts)
        with writing_service(part_size, at_a_time) as writing:
            writing.stream(content, target)

    def read(here: Location) -> None:
        consolidation.consolidate(loading, here, write, weights_only=weights_only)

    submission.read(source, read)
