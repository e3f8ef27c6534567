"""The service: saves, removes and loads checkpoints without making the program wait for storage.

Everything here runs on the caller's thread. It reports each failure to the caller once, and never replaces an error
that is in flight (E1, E2).

What does not belong here: how a request is submitted (submission) and waited for (waiting), the service's resources
(resources), sharded checkpoints (`sharded.operations`), how a request is carried out (dispatch).
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from async_ckpt.engine import waiting
from async_ckpt.engine.failures import Failures
from async_ckpt.engine.resources import ABANDON_GRACE_SECONDS, Resources, StoreFactory
from async_ckpt.engine.submission import Submission
from async_ckpt.engine.writers import Writer
from async_ckpt.errors import FlushTimeoutError
from async_ckpt.handle import Handle
from async_ckpt.options import ServiceOptions, check_grace
from async_ckpt.stores import Given, locate
from async_ckpt.stores.base import Content, Location, Workers
from async_ckpt.system.processes import process_id
from async_ckpt.telemetry.patience import Limit, Patience

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner

    from async_ckpt.sharded.operations import SavingRanks
    from async_ckpt.sharded.writing.writer import ShardedWriter

__all__ = ["CheckpointService", "StoreFactory"]

logger = logging.getLogger(__name__)


def _tell_nobody(*args: Any, **values: Any) -> None:
    pass


class CheckpointService:
    """Saves checkpoints without making the training loop wait for storage.

    Threads may share a service. As a context manager, plain or ``async``, it is closed at the end of the block;
    otherwise the interpreter's exit drains it. A service that is garbage-collected unclosed finishes everything it has
    accepted, frees its resources and issues a ``ResourceWarning``.

    Args:
        store_factory: makes the stores; for tests, and for storage that fsspec does not support.
        abandon_grace_seconds: how long cancelled work may take to clean up before it is left behind; zero leaves it at
            once.
        process_group: the ranks that make sharded checkpoints together; ``None`` takes all of them.
        store: a ``torch.distributed.Store`` that these ranks share, to agree through; ``None`` takes the one
            that ``init_process_group`` was given or made.
        **options: see ``ServiceOptions``: ``queue_depth``, ``memory_limit``, ``overflow``, ``snapshot``,
            ``max_concurrent_saves``, ``priority``, ``part_size``, ``max_concurrent_parts``, ``retry``,
            ``durability``, ``overwrite``, ``in_place``, ``page_cache``, ``on_error``, ``flush_timeout``,
            ``flush_deadline``, ``storage_options``, ``observer``.

    Attributes:
        known_as: for a plugin's service: what messages call it, and how to close it.

    Raises:
        OptionError: an option is not valid.
    """

    known_as: str | None = None

    def __init__(
        self,
        *,
        store_factory: StoreFactory | None = None,
        abandon_grace_seconds: float = ABANDON_GRACE_SECONDS,
        process_group: Any = None,
        store: Any = None,
        **options: Any,
    ) -> None:
        self._options = ServiceOptions.of(options)
        self._group = process_group, store
        self._store_factory = store_factory
        self._abandon_grace_seconds = check_grace(abandon_grace_seconds)
        self._reset()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # The garbage collector may call this: on any thread, at any line, under any lock.
        if is_finalizing() or "_own" not in self.__dict__ or process_id() != self._pid:
            return
        resources = self._own.resources
        was_closed = resources.is_closed
        try:
            left = resources.retire()
        except BaseException:  # Ctrl-C, which Python swallows here
            resources.retire()
            raise
        if left and not was_closed:  # last, as a filter may raise it
            told = f"unclosed {self.known_as or f'{self!r}: close it'}; what it has accepted goes on"
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)

    def _reset(self) -> None:
        self._pid = process_id()
        self._own = Submission(Resources(self._options, self._store_factory, self._abandon_grace_seconds))
        self.__dict__.pop("_ranks", None)

    @property
    def _submission(self) -> Submission:
        """Ours; a forked child leaves to its parent what is under way there (L1), and what failed there (E1)."""
        if process_id() != self._pid:
            self._reset()
        return self._own

    @property
    def _resources(self) -> Resources:
        return self._submission.resources

    @property
    def options(self) -> ServiceOptions:
        """The options, validated, with every default filled in."""
        return self._options

    # -- caller's thread: the public surface

    def save(self, state: Any, url: Given) -> Handle:
        """Take a snapshot of *state* and write it to *url* in the background.

        Returns once *state* may be changed again. That takes one copy in memory, and longer only if the queue or the
        memory is full, as ``overflow`` says (B1). The file will equal what ``torch.save(state, url)`` would write now
        (S1).

        Args:
            state: anything that ``torch.save`` takes.
            url: a local path, any URL that fsspec knows, or a ``UPath``. A symlink is followed, as ``open`` does, at
                the time of this call.

        Returns:
            A handle to wait for.

        Raises:
            UnpicklableStateError: *state* contains an object that pickle refuses; the save was not accepted.
            StoreError: *url* cannot be saved to; the save was not accepted.
            BackPressureError: there is no room, and ``overflow="raise"``; the save was not accepted.
            FlushTimeoutError: there was no room within ``flush_timeout``; the save was not accepted.
            ServiceClosedError: the service is closed.
            Exception: an *earlier* save failed, and this is the first call that can report it; the new save is accepted
                all the same (E1, E2).
        """
        return self.submit(state, locate(url, storage_options=self._options.storage_options))

    def save_sharded(self, state: Mapping[str, Any], url: Given) -> Handle:
        """Save this rank's part of a state that several processes hold, as a directory that torch's DCP opens.

        Every rank of the group calls it, with its own part, the same *url*, and in the same order of calls (O4). Like
        ``save`` it returns once *state* may be mutated; it waits for no other rank, and no collective is called (T1).

        The checkpoint exists from the instant at which its ``.metadata`` is durable: written last, by the first rank,
        when the bytes of every rank are. What was there before stays whole until then (D5).

        Args:
            state: what ``torch.distributed.checkpoint.save`` takes: nested mappings of ``DTensor``, ``ShardedTensor``,
                plain tensors, which each rank has alike, and anything that ``torch.save`` takes; or objects with
                ``state_dict``.
            url: of the directory: a local path, any URL that fsspec knows, or a ``UPath``.

        Returns:
            A handle to wait for: durable on every rank, or the same ``ShardedSaveError`` on every rank (E4).

        Raises:
            UnpicklableStateError: *state* holds what cannot be saved; it is named. The save fails on every rank.
            OptionError: ``overflow="supersede"``, of which each rank would decide differently.
            Exception: as ``save`` raises.
        """
        try:
            location = locate(url, storage_options=self._options.storage_options)
        except Exception as error:  # on this rank alone, perhaps: a package that is missing here
            self.refuse_sharded(error)
            raise
        return self.submit_sharded(state, location)[0]

    def remove(self, url: Given) -> Handle:
        """Delete the file or directory at *url* once every save accepted before is durable (D3).

        A save of *url* that has not started is cancelled (O3). If an earlier save fails, nothing is deleted, and the
        handle reports that.

        Args:
            url: a local path, any URL that fsspec knows, or a ``UPath``. It need not exist.

        Returns:
            A handle to wait for.

        Raises:
            ServiceClosedError: the service is closed.
            Exception: an earlier request failed, and this is the first call that can report it; the removal is accepted
                all the same.
        """
        location = locate(url, storage_options=self._options.storage_options, follow=False)
        return self.submit_removal(location)

    def load(
        self,
        url: Given,
        *,
        map_location: Any = None,
        weights_only: bool | None = True,
        keys: str | Sequence[str] | None = None,
        progress: bool | None = None,
        pickle_module: Any = None,
        **pickle_load_args: Any,
    ) -> Any:
        """Load a checkpoint with ``torch.load``; wait only for pending saves of *url* (O2).

        Up to ``max_concurrent_parts`` requests fetch the file at the same time, straight into the memory of the
        tensors. Each tensor's checksum is verified.

        Args:
            url: a local path, any URL that fsspec knows, or a ``UPath``.
            map_location: as for ``torch.load``.
            weights_only: as for ``torch.load``; ``None`` is its default, ``False`` lets the file run any code.
            keys: patterns of the values to load, such as ``"state_dict.encoder.*"``; nothing else is fetched.
                ``fnmatch`` compares a pattern with the path to a value: keys of mappings and positions in lists, joined
                by dots. A match includes everything below it.
            progress: whether to show progress; ``None`` shows it on a terminal if the load takes long.
            pickle_module: as for ``torch.load``; needs ``weights_only=False``.
            **pickle_load_args: as for ``torch.load``, such as ``encoding``.

        Returns:
            The state; with *keys*, only the values that match, nested as they were.

        Raises:
            FileNotFoundError: *url* does not exist.
            KeyError: a pattern of *keys* matches nothing.
            CorruptCheckpointError: the file is damaged.
            StoreError: the file cannot be read.
            ServiceClosedError: the service is closed, or was closed during the load.
            Exception: an earlier request failed, such as the save of *url*, and this is the first call that can report
                it; or ``torch.load`` refuses the file.
        """
        # By its name: the target of a link may change until this load's turn.
        location = locate(url, storage_options=self._options.storage_options, follow=False)
        resources = self._resources
        store = resources.store(location)

        def read(here: Location) -> Any:
            return resources.loads.read(
                here,
                store,
                resources.running(),
                map_location=map_location,
                keys=keys,
                progress=progress,
                weights_only=weights_only,
                pickle_module=pickle_module,
                arguments=pickle_load_args,
            )

        return self._submission.read(location, read)

    def load_sharded(
        self,
        state: MutableMapping[str, Any],
        url: Given,
        *,
        strict: bool = True,
        weights_only: bool = True,
        planner: LoadPlanner | None = None,
    ) -> None:
        """Fill *state* in place from a sharded checkpoint, or a plain file, after the pending saves of *url* (O2).

        Called on every rank, or on one; no rank waits for another. It does not matter how many ranks saved it. Each
        fetches what its own part of *state* needs, ``max_concurrent_parts`` requests at a time: of a plain file, too,
        such as ``save`` or ``torch.save`` writes, in which values have the same keys, or keys of keys.

        Args:
            state: what ``torch.distributed.checkpoint.load`` takes: DTensors, ShardedTensors, tensors, anything
                picklable, in mappings and lists; or objects with ``state_dict`` and ``load_state_dict``.
            url: of a directory that we, or torch, have written, or of a file of torch's; on any storage.
            strict: whether what the checkpoint does not have is an error; else it is left as it is.
            weights_only: as for ``torch.load``; of what is no tensor, ``False`` runs code that the checkpoint names.
            planner: what says what goes where; ``None`` takes torch's.

        Raises:
            IncompleteCheckpointError: there is nothing at *url*, or a directory that is no complete checkpoint.
            KeyError: something in *state* is not in the checkpoint; the message lists what.
            ValueError: something has another size; the message lists what.
            pickle.UnpicklingError: a value needs more than ``weights_only`` allows; the message names it.
            CorruptCheckpointError: the checkpoint is damaged; *state* may have been filled in part.
            StoreError: it cannot be read.
            ServiceClosedError: the service was closed, maybe meanwhile.
            Exception: an earlier request failed, and this is the first call that can report it, as for ``load``.
        """
        from async_ckpt.sharded import operations  # here, because it imports torch.distributed

        location = locate(url, storage_options=self._options.storage_options, follow=False)
        operations.load(
            self._submission, state, location, strict=strict, weights_only=weights_only, planner=planner
        )

    def consolidate(
        self,
        directory_url: Given,
        file_url: Given,
        *,
        weights_only: bool = True,
        file_storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make one file of ``torch.save`` from a sharded checkpoint, in bounded memory; see ``async_ckpt.consolidate``.

        It comes after the pending saves of *directory_url* and of *file_url* (O1, O2), and returns when the file is
        durable (D1). The service's options for storage hold for the file, too, but for its parts, which are smaller.

        Args:
            directory_url: what ``save_sharded``, or torch, has written; on any storage.
            file_url: where the file goes; on any storage.
            weights_only: as for ``torch.load``; of what is no tensor, ``False`` runs code that the checkpoint names.
            file_storage_options: passed to the file system of *file_url*; ``None`` takes ``storage_options``.

        Raises:
            IncompleteCheckpointError: there is no sharded checkpoint at *directory_url*, or none that is complete.
            pickle.UnpicklingError: a value needs more than ``weights_only`` allows; the message names it.
            CorruptCheckpointError: the checkpoint is damaged.
            CheckpointExistsError: there is a file at *file_url*, and ``overwrite=False``.
            OptionError: the places are one and the same.
            StoreError: the checkpoint cannot be read, or the file not be written.
            ServiceClosedError: the service was closed, maybe meanwhile.
            Exception: an earlier request failed, and this is the first call that can report it, as for ``load``.
        """
        from async_ckpt.sharded import operations

        options = self._options
        source = locate(directory_url, storage_options=options.storage_options, follow=False)
        if file_storage_options is None:
            file_storage_options = options.storage_options
        target = locate(file_url, storage_options=file_storage_options)

        def writing_service(part_size: int, max_concurrent_parts: int) -> CheckpointService:
            return self._copy(
                part_size=part_size,
                max_concurrent_parts=max_concurrent_parts,
                storage_options=file_storage_options,
                observer=None,
            )

        operations.consolidate(self._submission, source, target, writing_service, weights_only=weights_only)

    def newest(self, url: Given) -> str | None:
        """Return the name of the newest complete checkpoint in the directory at *url*; see ``async_ckpt.latest``."""
        from async_ckpt.sharded.latest import find_newest  # here, because few programs need it

        location = locate(url, storage_options=self._options.storage_options)
        resources = self._resources
        store = resources.store(location)
        return resources.loads.run(resources.running(), partial(find_newest, store, location))

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything accepted so far has ended.

        Args:
            timeout: seconds to wait at most, with or without progress; ``None`` uses ``flush_timeout`` and
                ``flush_deadline``.

        Raises:
            FlushTimeoutError: the time passed first; or this is a signal handler, and the pending requests come after
                the call that it interrupted. Nothing is given up; wait again.
            Exception: a save failed; several failures are raised as one ``FlushError``.
        """
        waiting.wait(self._resources, self._limit(timeout))
        self.failures.raise_all()

    def settle(self, timeout: float | None = None) -> None:
        """Like ``wait``, for callers that are already handling an error: ours is logged and added to its notes (E2)."""
        try:
            waiting.wait(self._resources, self._limit(timeout))
        except FlushTimeoutError as error:
            logger.warning("%s", error)
        self.failures.raise_or_add()

    async def flush(self, timeout: float | None = None) -> None:
        """Like ``wait``, awaited under asyncio or trio, without blocking the event loop."""
        await waiting.flush(self._resources, self._limit(timeout))
        self.failures.raise_all()

    def _limit(self, timeout: float | None) -> Limit:
        return self._options.limit(timeout)

    def patience(self, timeout: float | None = None, **options: Any) -> Patience:
        """Return a ``Patience``, made with *options*, that lets a plugin wait as long as ``wait`` does."""
        return self._resources.patience(self._limit(timeout), **options)

    @property
    def pending(self) -> tuple[Handle, ...]:
        """The handles of all saves and removals that have not ended, oldest first."""
        return self._resources.pending()

    def close(self, timeout: float | None = None) -> None:
        """Finish everything that was accepted, then free threads, memory and connections.

        Requests that have not ended after *timeout* are abandoned: they fail, unfinished files are removed, and earlier
        checkpoints stay. Closing again does nothing.

        Args:
            timeout: seconds to wait at most, with or without progress; ``None`` uses ``flush_timeout`` and
                ``flush_deadline``.

        Raises:
            Exception: a save failed, and this is the first call that can report it; several failures are raised as one
                ``FlushError``. An error that is already in flight is not replaced: ours is logged and added to its
                notes (E2).
        """
        self._resources.close(self._limit(timeout))
        self.failures.raise_or_add()

    @property
    def is_running(self) -> bool:
        """Whether it holds threads, memory or connections."""
        return self._resources.is_held

    def rest(self) -> None:
        """Free threads, memory and connections, unless a request is pending or its failure is yet to be reported.

        The next request acquires them anew. No other thread may be making a request now.
        """
        resources = self._resources
        limit = self._limit(None)
        resources.close_predecessor(limit)
        if resources.is_idle():
            successor = resources.successor()
            # In one step: a signal handler sees either the old runtime or none (L1).
            self._own = Submission(successor)
            successor.is_closed = resources.is_closed  # by a signal handler, just now
            successor.close_predecessor(limit)

    async def aclose(self, timeout: float | None = None) -> None:
        """Like ``close``, awaited under asyncio or trio, without blocking the event loop.

        If it is cancelled, it returns at once, and the closing goes on in a thread; failures are then logged.
        """
        failures = self.failures
        await waiting.aclose(self._resources, self._limit(timeout), if_cancelled=failures.log)
        self.failures.raise_or_add()

    def __enter__(self) -> CheckpointService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> CheckpointService:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _copy(self, **options: Any) -> CheckpointService:
        """Return a new service with the same options, except for *options*."""
        service = copy(self)
        service._options = replace(self._options, **options)
        service._reset()
        return service

    def __getstate__(self) -> Mapping[str, Any]:
        return {
            "options": self._options,
            "store_factory": self._store_factory,
            "abandon_grace_seconds": self._abandon_grace_seconds,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._options = state["options"]
        self._store_factory = state["store_factory"]
        self._abandon_grace_seconds = state["abandon_grace_seconds"]
        self._group = None, None  # of this process, where it has one
        self._reset()

    # -- for plugins

    def submit(
        self,
        state: Any,
        location: Location,
        writer: Writer | None = None,
        *,
        share_unpicklable: bool = False,
        tell: bool = True,
    ) -> Handle:
        """Like ``save``, with any writer.

        Args:
            state: what to write.
            location: from ``locate``.
            writer: writes the state; ``None`` uses our own writer.
            share_unpicklable: pass objects that pickle refuses by reference, for writers that do not pickle.
            tell: raise an earlier failure; else the next call does.
        """
        return self._submission.save(state, location, writer, share_unpicklable=share_unpicklable, tell=tell)

    def submit_sharded(
        self,
        state: Mapping[str, Any],
        location: Location,
        *,
        extras: Mapping[str, Any] | None = None,
        tell: bool = True,
    ) -> tuple[Handle, ShardedWriter]:
        """Like ``save_sharded``, with files that others expect to lie beside the checkpoint's own.

        Args:
            state: this rank's part.
            location: from ``locate``.
            extras: values, by name, that get files of their own beside ``.metadata``, and are items of the checkpoint;
                on the first rank only.
            tell: raise an earlier failure; else the next call does.

        Returns:
            The handle, and what writes the checkpoint: it has its description when that has ended.
        """
        handle, writer = self._saving_ranks().save(self._submission, state, location, extras=extras)
        if tell:
            self.failures.raise_unless_in_flight(but=handle)
        return handle, writer

    def refuse_sharded(self, error: Exception) -> None:
        """Tell the other ranks that this one's part of the next sharded save fails before there is a location (O4)."""
        self._saving_ranks().refuse(self._resources, error)

    def _saving_ranks(self) -> SavingRanks:
        from async_ckpt.sharded.operations import SavingRanks

        ranks = SavingRanks(*self._group, self._resources.options)
        # In one step: a signal handler may have made them just now, and there must not be two (O4).
        return self.__dict__.setdefault("_ranks", ranks)  # type: ignore[no-any-return]

    def submit_removal(self, location: Location, writer: Writer | None = None) -> Handle:
        """Like ``remove``, with any writer; ``None`` uses our own."""
        return self._submission.remove(location, writer)

    def submit_link(self, location: Location, target: Location) -> Handle:
        """Make *location*, on a local disk, a link to *target* once the newest save of *target* is durable.

        Args:
            location: the link, from ``locate(…, follow=False)``.
            target: the checkpoint.
        """
        return self._submission.link(location, target)

    def stream(self, content: Content, location: Location) -> None:
        """Write bytes from elsewhere to *location*, after earlier operations there; block until the file is durable.

        Args:
            content: the file.
            location: from ``locate``.
        """
        resources = self._resources
        with self.turn(location):
            stream = partial(resources.writer(location).stream, content, location, _tell_nobody)
            # After Ctrl-C, too, what was begun is removed before this ends.
            resources.loads.run(resources.running(), stream, end_seconds=self._abandon_grace_seconds)

    def turn(self, location: Location) -> AbstractContextManager[Location]:
        """Reserve *location* for reading: earlier operations on it have ended, later ones wait (O1, O2).

        Args:
            location: from ``locate``; the target of a link is reserved as well.

        Returns:
            A context in which the location does not change; it yields the location with its links resolved.

        Raises:
            FlushTimeoutError: earlier operations did not end within ``flush_timeout``.
            RuntimeError: this is a signal handler, and an earlier operation comes after the call that it interrupted.
            Exception: an earlier request failed, and this is the first call that can report it.
        """
        return self._submission.turn(location)

    @property
    def failures(self) -> Failures:
        """The failures that have not been reported yet."""
        return self._resources.account.failures

    def workers(self) -> Workers:
        """Return the service's worker threads, for blocking calls."""
        resources = self._resources
        resources.running()
        return resources.workers
