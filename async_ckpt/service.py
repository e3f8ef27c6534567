"""The service: what a program holds to save, remove and load checkpoints without waiting for storage.

Everything here runs on the caller's thread. It takes the snapshot, sends requests to the dispatcher on the
loop thread, waits for nothing but a place, memory or a result, and tells the caller what failed: once, and
never in place of an error that is in flight (E1, E2).

What does not belong here: which operation may run (queue), what becomes of it (dispatch), how bytes are
written (writers, stores).
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic, time
from types import TracebackType
from typing import Any, TypeAlias

import anyio

from async_ckpt import runtime as runtimes
from async_ckpt.budget import Budget
from async_ckpt.dispatch import Account, Request
from async_ckpt.errors import FlushTimeoutError, ServiceClosedError
from async_ckpt.failures import Failures, tell
from async_ckpt.handle import Handle, Outcome, State, await_outcome
from async_ckpt.loading import Loads
from async_ckpt.options import ServiceOptions
from async_ckpt.queue import Kind, Lane, Op, Phase
from async_ckpt.runtime import PoolWorkers, Runtime
from async_ckpt.snapshot import Capture, HostPool, capture
from async_ckpt.stores import check_target, is_local, locate, open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.writers import Linker, StreamingWriter, Writer

__all__ = ["CheckpointService", "StoreFactory", "load"]

logger = logging.getLogger(__name__)

ABANDON_GRACE_SECONDS = 10.0
"""How long work that was told to stop, and stores that are closed, may take before they are left behind."""

SILENT_EXIT_SECONDS = 1.0
"""How long the interpreter's exit waits for pending saves before it says so."""

READS_OF_LOAD = 8
"""Requests at a time of a load on its own, beside which no save wants the connections."""


StoreFactory: TypeAlias = Callable[[Location, Workers], Store]
"""Makes the store that serves a location; it is asked once for each ``location.group``."""


class CheckpointService:
    """Saves checkpoints without making the training loop wait for storage.

    Threads of a program may share a service. Used as a context manager, plain or ``async``, it is closed
    at the end; otherwise the interpreter's exit drains it.

    Args:
        store_factory: makes the stores, for tests and for storage that fsspec does not know.
        abandon_grace_seconds: how long work that was told to stop may take to clean up before it is left behind.
        **options: see ``ServiceOptions``: ``queue_depth``, ``memory_limit``, ``overflow``, ``snapshot``,
            ``max_concurrent_saves``, ``part_size``, ``max_concurrent_parts``, ``retry``, ``durability``,
            ``overwrite``, ``on_error``, ``flush_timeout``, ``storage_options``, ``observer``.

    Raises:
        OptionError: an option cannot work.
    """

    def __init__(
        self,
        *,
        store_factory: StoreFactory | None = None,
        abandon_grace_seconds: float = ABANDON_GRACE_SECONDS,
        **options: Any,
    ) -> None:
        self._options = ServiceOptions.of(options)
        self._store_factory = store_factory
        self._abandon_grace_seconds = abandon_grace_seconds
        self._reset()

    def _reset(self) -> None:
        options = self._options
        self._pid = os.getpid()
        self._closed = False
        self._runtime: Runtime | None = None
        self._stores: dict[str, Store] = {}
        self._loads = self._new_loads()
        self._account = Account(
            lane=Lane(
                queue_depth=options.queue_depth,
                max_concurrent_saves=options.max_concurrent_saves,
                overflow=options.overflow,
            ),
            pool=HostPool(Budget(options.memory_limit_bytes)),
            observer=options.observer,
            failures=Failures(warn=options.on_error == "warn"),
        )
        # No thread starts before it is needed. Made here, so that threads which come first together share them.
        self._workers = self._new_workers()

    def _new_loads(self) -> Loads:
        return Loads(self._options.max_concurrent_parts)

    def _new_workers(self) -> PoolWorkers:
        return PoolWorkers(self._options.max_concurrent_parts + self._options.max_concurrent_saves)

    @property
    def options(self) -> ServiceOptions:
        """The options, validated, with every default filled in."""
        return self._options

    # -- caller's thread: the public surface

    def save(self, state: Any, url: str | os.PathLike[str]) -> Handle:
        """Take a snapshot of *state* and have it written to *url*.

        Returns once *state* may be mutated. That takes the time of one copy in memory, and waits longer
        only for a place in the queue or for memory, as ``overflow`` says (B1). The file will equal what
        ``torch.save(state, url)`` would have written now (S1).

        Args:
            state: anything that ``torch.save`` takes.
            url: a local path, or any URL that fsspec knows.

        Returns:
            A handle to wait for.

        Raises:
            UnpicklableStateError: *state* holds what pickle refuses; nothing was accepted.
            StoreError: *url* cannot be a checkpoint's; nothing was accepted.
            BackPressureError: there is no room and ``overflow="raise"``; nothing was accepted.
            FlushTimeoutError: there was no room for ``flush_timeout``; nothing was accepted.
            ServiceClosedError: the service is closed.
            Exception: an *earlier* save failed and nobody has been told yet; this one is accepted all the
                same (E1, E2).
        """
        return self.submit(state, locate(url, storage_options=self._options.storage_options))

    def remove(self, url: str | os.PathLike[str]) -> Handle:
        """Have what is at *url* deleted, once every save accepted before is durable (D3).

        A save of *url* that has not started is cancelled (O3). If one of the saves before fails, nothing is
        deleted, and the handle says so.

        Args:
            url: a local path, or any URL that fsspec knows. Nothing there is not an error.

        Returns:
            A handle to wait for.

        Raises:
            ServiceClosedError: the service is closed.
            Exception: an earlier request failed and nobody has been told yet; this one is accepted all the same.
        """
        location = locate(url, storage_options=self._options.storage_options, follow=False)
        return self.submit_removal(location)

    def load(
        self,
        url: str | os.PathLike[str],
        *,
        map_location: Any = None,
        weights_only: bool | None = True,
        keys: str | Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Load a checkpoint with ``torch.load``, after the pending saves of *url*, not of others (O2).

        The file is fetched by several requests at a time, ``max_concurrent_parts`` at most, straight into the
        memory of the tensors, and each tensor's checksum is compared with the file's.

        Args:
            url: a local path, or any URL that fsspec knows.
            map_location: as for ``torch.load``.
            weights_only: as for ``torch.load``, whose default ``None`` takes; ``False`` runs code that the
                file names.
            keys: load only what these patterns match, and fetch no more: ``"state_dict.encoder.*"``. A pattern
                is compared, as ``fnmatch`` does, with the way to a value: the keys of mappings and the positions
                in lists, joined by dots. One that matches takes everything below.
            progress: whether to show how far it is; ``None`` does so on a terminal, when it takes long.

        Returns:
            The state; with *keys*, nested as it was, with nothing but what matched.

        Raises:
            FileNotFoundError: there is nothing at *url*.
            KeyError: a pattern of *keys* matches nothing.
            CorruptCheckpointError: the file is damaged.
            StoreError: the file cannot be read.
            ServiceClosedError: the service was closed, maybe meanwhile.
            Exception: an earlier request failed and nobody has been told yet, a save of *url* that we waited
                for among them; or ``torch.load`` refuses the file.
        """
        location = locate(url, storage_options=self._options.storage_options)
        store = self._store(location)
        with self.turn(location):
            return self._loads.read(
                location,
                store,
                self._running(),
                map_location=map_location,
                weights_only=weights_only,
                keys=keys,
                progress=progress,
            )

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything accepted so far has ended.

        Args:
            timeout: seconds; ``None`` takes ``flush_timeout``.

        Raises:
            FlushTimeoutError: the time passed first. Nothing is given up; wait again.
            Exception: a save failed; several come as one ``FlushError``.
        """
        drained = self._drained()
        limit = self._options.flush_timeout if timeout is None else timeout
        try:
            drained.result(limit)
        except TimeoutError:
            raise self._too_late(limit) from None
        self.failures.raise_all()

    def settle(self, timeout: float | None = None) -> None:
        """Do what ``wait`` does for who handles an error: ours is logged and added to that one's notes (E2)."""
        drained = self._drained()
        limit = self._options.flush_timeout if timeout is None else timeout
        try:
            drained.result(limit)
        except TimeoutError:
            logger.warning("%s", self._too_late(limit))
        self.failures.raise_or_add()

    async def flush(self, timeout: float | None = None) -> None:
        """Do what ``wait`` does, awaited: under asyncio or trio, without blocking the loop."""
        drained = self._drained()
        limit = self._options.flush_timeout if timeout is None else timeout
        with anyio.move_on_after(limit):
            await await_outcome(drained)
        if not drained.done():
            raise self._too_late(limit)
        self.failures.raise_all()

    @property
    def pending(self) -> tuple[Handle, ...]:
        """The handles of all saves and removals that have not ended, oldest first."""
        return tuple(handle for handle in self._handles() if not handle.done())

    def close(self, timeout: float | None = None) -> None:
        """Accept no more, see everything to its end, and free threads, memory and connections.

        What is not done after *timeout* is abandoned: it fails, its unfinished file is cleaned away, and
        earlier checkpoints stay. Closing again does nothing.

        Args:
            timeout: seconds; ``None`` takes ``flush_timeout``.

        Raises:
            Exception: a save failed and nobody has been told yet; several come as one ``FlushError``. An error
                that is in flight already is not replaced: ours is logged and added to its notes (E2).
        """
        self._drain_and_free(self._options.flush_timeout if timeout is None else timeout)
        self.failures.raise_or_add()

    @property
    def is_running(self) -> bool:
        """Whether it holds threads, memory or connections."""
        return self._held() is not None

    def rest(self) -> None:
        """Free threads, memory and connections, unless something is under way; the next request starts them anew.

        What failed, and what is durable, stays known.
        """
        runtime = self._held()
        if runtime is not None and runtime.call(runtime.dispatcher.is_idle, self._account):
            self._free(runtime, stuck=False)
            self._loads, self._workers = self._new_loads(), self._new_workers()

    async def aclose(self, timeout: float | None = None) -> None:
        """Do what ``close`` does, awaited: under asyncio or trio, without blocking the loop.

        Cancelled, it returns at once and the closing goes on in a thread; what fails then is logged.
        """
        limit = self._options.flush_timeout if timeout is None else timeout
        # Not anyio.to_thread: it starts no thread for who is cancelled already, as the body of an async with may be.
        thread = ThreadPoolExecutor(1, thread_name_prefix="async_ckpt-closing")
        closing = thread.submit(self._drain_and_free, limit)
        thread.shutdown(wait=False)
        closed: Outcome[None] = Outcome()
        closing.add_done_callback(lambda _: closed.set_result(None))
        try:
            await await_outcome(closed)
        except BaseException:
            closed.add_done_callback(self.failures.log)  # nobody is there to be told
            raise
        closing.result()
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
        """Do what ``save`` does, with any writer.

        Args:
            state: what to write.
            location: from ``locate``.
            writer: what writes it; ``None`` takes our own.
            share_unpicklable: pass what pickle refuses by reference, for writers that do not pickle.
            tell: raise an earlier failure; else the next call does.
        """
        runtime = self._running()
        if writer is None:
            check_target(location)
            writer = self._streaming_writer(location)
        started_seconds = monotonic()
        captured = capture(state, share_unpicklable=share_unpicklable)
        op = self._op(Kind.SAVE, location, writer, nbytes=captured.nbytes)
        request = Request(op, self._account, location, writer)
        request.started_seconds = started_seconds
        dispatcher = runtime.dispatcher
        try:
            if writer.only_reads:
                self._borrow(request, captured, runtime)
            runtime.post(dispatcher.take_in, request)
            self._await_admission(request)
            borrows, buffer = request.borrows, request.buffer  # in this order: closing takes both away
            if buffer is None:
                raise ServiceClosedError("the service was closed meanwhile")
            snapshot = captured.share(buffer) if borrows else captured.stage(buffer)
            if writer.only_reads and not request.given_up:
                self._account.newest = request, snapshot
            request.stall_seconds = monotonic() - started_seconds
            request.staged_at_seconds = time()
            request.handle._state = State.STAGED  # here, so that it is true when save returns
            runtime.post(dispatcher.staged, request, snapshot)
        except BaseException as error:
            with suppress(ServiceClosedError):
                runtime.post(dispatcher.withdraw, request)
            if request.given_up and isinstance(error, Exception):  # closed beneath us, memory and all
                raise ServiceClosedError("the service was closed meanwhile") from error
            raise
        if tell:
            self.failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    def _borrow(self, request: Request, captured: Capture, runtime: Runtime) -> None:
        """Have *request* hold the memory of the newest snapshot, if that is of the very same bytes (S1)."""
        newest = self._account.newest
        if newest is None or not captured.resembles(newest[1]):
            return
        if runtime.call(runtime.dispatcher.lend, request, *newest):
            buffer = request.buffer
            if buffer is None or not captured.equals(buffer):
                runtime.post(runtime.dispatcher.take_back, request)

    def _await_admission(self, request: Request) -> None:
        """Wait for a place and memory, as the user's own bounds say, but not for ever (B2)."""
        limit = self._options.flush_timeout
        try:
            request.admitted.result(limit)
        except TimeoutError:
            raise FlushTimeoutError(
                f"{request.location.url!r} was not accepted: no room after {limit:g} s; "
                f"pending: {self._pending_urls()}"
            ) from None

    def submit_removal(self, location: Location, writer: Writer | None = None) -> Handle:
        """Do what ``remove`` does, with any writer; ``None`` takes our own."""
        runtime = self._running()
        writer = self._streaming_writer(location) if writer is None else writer
        request = Request(self._op(Kind.REMOVE, location, writer), self._account, location, writer)
        runtime.post(runtime.dispatcher.take_in, request)
        self.failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    def submit_link(self, location: Location, target: Location) -> Handle:
        """Have *location*, on a local disk, lead to *target* once the newest save of that is durable.

        Args:
            location: the second name, from ``locate(…, follow=False)``.
            target: the checkpoint.
        """
        runtime = self._running()
        linker = Linker(target, self._workers, self._options.durability)
        request = Request(
            self._op(Kind.LINK, location, None, target=target.key), self._account, location, linker
        )
        runtime.post(runtime.dispatcher.take_in, request)
        self.failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    @contextmanager
    def turn(self, location: Location) -> Iterator[None]:
        """Hold *location* for reading: earlier operations on it have ended, later ones wait (O1, O2).

        Raises:
            FlushTimeoutError: the earlier ones took longer than ``flush_timeout``.
            Exception: an earlier request failed and nobody has been told yet; one that we waited for counts.
        """
        if is_local(location) and os.path.islink(location.path):  # it may be about to lead elsewhere
            with self._turn(locate(location.url, follow=False)):
                location = locate(location.url)
        with self._turn(location):
            yield

    @contextmanager
    def _turn(self, location: Location) -> Iterator[None]:
        self.failures.raise_all()
        if runtimes.current() is None:  # nothing is under way in this process
            yield
            return
        runtime = self._running()
        request = Request(self._op(Kind.LOAD, location, None), self._account, location, None)
        try:
            runtime.post(runtime.dispatcher.take_in, request)
            try:
                request.admitted.result(self._options.flush_timeout)
            except TimeoutError:
                raise self._too_late(self._options.flush_timeout) from None
            self.failures.raise_all()  # else the content from before a failed save would pass for the new one
            yield
        finally:
            with suppress(ServiceClosedError):  # closed while we read: nobody waits for the end of our turn
                runtime.post(runtime.dispatcher.withdraw, request)

    @property
    def failures(self) -> Failures:
        """What failed and has not been told yet."""
        self._start_afresh_in_child()
        return self._account.failures

    def workers(self) -> Workers:
        """Return the service's threads for what blocks."""
        self._running()
        return self._workers

    # -- the runtime

    def _running(self) -> Runtime:
        self._start_afresh_in_child()
        if self._closed:
            raise ServiceClosedError("the service has been closed; make a new one")
        runtime = self._runtime
        if runtime is None:
            runtime = self._runtime = runtimes.acquire(self)
            if self._closed:  # meanwhile, by a signal handler or another thread
                self._runtime = None
                runtimes.release(runtime, self)
                raise ServiceClosedError("the service was closed meanwhile")
        runtime.refuse_loop_thread()
        return runtime

    def _held(self) -> Runtime | None:
        self._start_afresh_in_child()
        return self._runtime

    def _start_afresh_in_child(self) -> None:
        """Leave to the parent process what it has under way (L1), and the telling of what failed there (E1)."""
        if os.getpid() != self._pid:
            self._reset()

    def _drained(self) -> Outcome[None]:
        runtime = self._held()
        if runtime is not None:
            return runtime.call(runtime.dispatcher.expect_drained, self._account)
        nothing: Outcome[None] = Outcome()
        nothing.set_result(None)
        return nothing

    def _handles(self) -> list[Handle]:
        runtime = self._held()
        return [] if runtime is None else runtime.call(runtime.dispatcher.handles, self._account)

    def _drain_and_free(self, limit: float) -> None:
        runtime = self._held()
        if runtime is not None:
            runtime.refuse_loop_thread()
        self._closed = True
        if runtime is None:
            return
        stuck = False
        with suppress(ServiceClosedError):  # the loop has ended: this comes again, after an interruption
            drained = runtime.call(runtime.dispatcher.close, self._account, thread=threading.get_ident())
            try:
                drained.result(limit)
            except TimeoutError:
                stuck = self._abandon(runtime, f"not done{_after(limit)} when its service was closed")
        self._free(runtime, stuck=stuck)

    def _abandon(self, runtime: Runtime, reason: str) -> bool:
        """Give up what is not done; tell whether a thread is stuck in storage and had to be left behind."""
        stopped = runtime.call(runtime.dispatcher.cancel_all, self._account, reason)
        try:
            stopped.result(self._abandon_grace_seconds)
        except TimeoutError:
            runtime.call(runtime.dispatcher.leave_behind, self._account)
            return True
        return False

    def _free(self, runtime: Runtime, *, stuck: bool) -> None:
        # Each step may be taken twice: by two threads, or again after an interruption.
        try:
            with suppress(RuntimeError):  # another thread was faster
                self._loads.end()
                if not stuck:
                    runtime.call_async(_close_all, self._stores).result()
                runtime.call(self._account.pool.close)
        finally:
            self._workers.close(wait=not stuck)
            runtimes.release(runtime, self, stuck=stuck)
            self._runtime = None

    def _op(
        self,
        kind: Kind,
        location: Location,
        writer: Writer | None,
        *,
        nbytes: int = 0,
        target: str | None = None,
    ) -> Op:
        return Op(
            id=0,  # it gets one where it comes in
            lane=self._account.lane,
            kind=kind,
            key=location.key,
            phase=Phase.WAITING if kind is Kind.SAVE else Phase.QUEUED,
            thread=threading.get_ident(),
            group=None if writer is None else writer.group,
            nbytes=nbytes,
            target=target,
        )

    def _streaming_writer(self, location: Location) -> StreamingWriter:
        self._running()
        return StreamingWriter(self._store(location), self._workers, self._options)

    def _store(self, location: Location) -> Store:
        store = self._stores.get(location.group)
        if store is None:
            self._running()
            make = self._store_factory or self._open_store
            store = self._stores.setdefault(location.group, make(location, self._workers))
        return store

    def _open_store(self, location: Location, workers: Workers) -> Store:
        options = self._options
        return open_store(
            location,
            workers=workers,
            storage_options=options.storage_options,
            durability=options.durability,
            retry=options.retry,
            overwrite=options.overwrite,
            part_size=options.part_size_bytes,
            max_concurrent_parts=options.max_concurrent_parts,
        )

    def _too_late(self, limit: float) -> FlushTimeoutError:
        return FlushTimeoutError(f"still pending{_after(limit)}, and going on: {self._pending_urls()}")

    def _pending_urls(self) -> str:
        return ", ".join(repr(handle.url) for handle in self.pending)

    def drain_at_exit(self) -> bool:
        """End everything because the interpreter exits (D4); print what nobody has collected (E1)."""
        limit = self._options.flush_timeout
        try:
            try:
                try:
                    self._drained().result(min(limit, SILENT_EXIT_SECONDS))
                except TimeoutError:
                    tell(f"waiting up to {limit:g} s until {self._pending_urls()} are done; Ctrl-C gives up")
                self._drain_and_free(limit)
            except KeyboardInterrupt:
                tell("interrupted: pending checkpoints are given up")
                self._drain_and_free(0.0)
        except BaseException:  # Ctrl-C once more
            tell(f"pending checkpoints could not be ended:\n{traceback.format_exc()}")
            return False
        return not self.failures.print_at_exit()


def load(
    url: str | os.PathLike[str],
    *,
    map_location: Any = None,
    weights_only: bool | None = True,
    keys: str | Sequence[str] | None = None,
    progress: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a checkpoint with ``torch.load``, after the pending saves of *url* in this process (O2).

    Args:
        url: a local path, or any URL that fsspec knows.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``, whose default ``None`` takes; ``False`` runs code that the file names.
        keys: load only what these patterns match, and fetch no more; see ``CheckpointService.load``.
        progress: whether to show how far it is; ``None`` does so on a terminal, when it takes long.
        storage_options: passed to the fsspec file system.

    Returns:
        The state; with *keys*, nested as it was, with nothing but what matched.

    Raises:
        FileNotFoundError: there is nothing at *url*.
        KeyError: a pattern of *keys* matches nothing.
        CorruptCheckpointError: the file is damaged.
        StoreError: the file cannot be read.
    """
    with CheckpointService(storage_options=storage_options, max_concurrent_parts=READS_OF_LOAD) as service:
        return service.load(
            url, map_location=map_location, weights_only=weights_only, keys=keys, progress=progress
        )


def _after(limit: float) -> str:
    return f" after {limit:g} s" if limit else ""  # none where its caller had waited already


async def _close_all(stores: dict[str, Store]) -> None:
    while stores:
        _, store = stores.popitem()
        try:
            with anyio.move_on_after(ABANDON_GRACE_SECONDS):
                await store.aclose()
        except Exception:
            logger.exception("a store could not be closed")
