"""The resources of one service: its use of the loop thread, worker threads, host memory, and connections.

Guarantees: they are acquired by the first request, and released by `Resources.close`, when the service is garbage
collected, or when the interpreter exits (B2, D4). Before that, requests in progress end; where somebody waits, within a
deadline. Each step may be interrupted and repeated, by this thread or another (L1).

What does not belong here: requests (submission), what a caller is told (service).
"""

from __future__ import annotations

import logging
import math
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol, TypeAlias

import anyio

from async_ckpt.engine import runtime as runtimes
from async_ckpt.engine.failures import Failures, tell
from async_ckpt.engine.loading import Loads
from async_ckpt.engine.queue import Lane
from async_ckpt.engine.request import Account
from async_ckpt.engine.runtime import Runtime, RuntimeUser
from async_ckpt.engine.workers import PoolWorkers
from async_ckpt.engine.writers import StreamingWriter
from async_ckpt.errors import FlushTimeoutError, ServiceClosedError
from async_ckpt.handle import Handle, Outcome, await_outcome
from async_ckpt.options import ServiceOptions
from async_ckpt.snapshot import HostPool
from async_ckpt.snapshot.budget import Budget
from async_ckpt.snapshot.lazy import Switch, watch
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.local.link import Links
from async_ckpt.stores.redaction import presentable
from async_ckpt.telemetry.patience import Limit, Patience

__all__ = ["ABANDON_GRACE_SECONDS", "Resources", "StoreFactory"]

logger = logging.getLogger(__name__)

ABANDON_GRACE_SECONDS = 10.0
"""How long cancelled work may take to stop before it is left behind."""

FREE_SECONDS = 10.0
"""How long closing all stores and threads may take."""

SILENT_EXIT_SECONDS = 1.0
"""How long the interpreter's exit waits for pending saves before it prints a message."""


StoreFactory: TypeAlias = Callable[[Location, Workers], Store]
"""Makes the store for a location; called once for each ``location.group``."""


class Closable(Protocol):
    """An object that is closed on the loop."""

    async def aclose(self) -> None:
        """Close it, within a few seconds."""


class Resources:
    """The resources of one service in one process; a forked child makes its own.

    Args:
        options: of the service.
        store_factory: makes the stores; ``None`` makes those that fsspec knows.
        abandon_grace_seconds: how long cancelled work may take to clean up before it is left behind.

    Attributes:
        has_own_stores: whether the stores come from the user's factory, so that their limits are unknown.
        account: the service as the dispatcher knows it.
        is_closed: whether no more requests are accepted.
        loads: those in progress.
        workers: the threads for blocking calls.
        copiers: the threads that copy snapshots after the call, and wait for nothing but that.
        links: creates links.
        attached: other objects to close with the service, by name; before the stores, and not in ``rest``.
    """

    def __init__(
        self, options: ServiceOptions, store_factory: StoreFactory | None, abandon_grace_seconds: float
    ) -> None:
        self.options = options
        self.is_closed = False
        self.has_own_stores = store_factory is not None
        # So that no copy waits for storage; one more, as a save that runs looks after its copy.
        self.copiers = PoolWorkers(options.max_concurrent_saves + 1)
        self.account = Account(
            lane=Lane(
                queue_depth=options.queue_depth,
                max_concurrent_saves=options.max_concurrent_saves,
                overflow=options.overflow,
            ),
            pool=HostPool(Budget(options.memory_limit_bytes)),
            observer=options.observer,
            failures=Failures(warn=options.on_error == "warn"),
            copiers=self.copiers,
            gives_way=options.priority == "background",
            lazy=Switch(is_on=options.snapshot == "lazy"),
        )
        if options.snapshot == "lazy":
            watch()
        # No thread starts before it is needed. Made here, so that concurrent first requests share them.
        self.loads = Loads(options.max_concurrent_parts)
        self.workers = PoolWorkers(options.max_concurrent_parts + options.max_concurrent_saves)
        self.links = Links(options.durability)
        self._store_factory = store_factory
        self._abandon_grace_seconds = abandon_grace_seconds
        self.attached: dict[str, Closable] = {}
        self._stores: dict[str, Store] = {}
        self._writers: dict[str, StreamingWriter] = {}
        self._runtime_user = RuntimeUser(self)
        self._runtime: Runtime | None = None
        self._predecessor: Resources | None = None

    def successor(self) -> Resources:
        """Return a replacement that has acquired nothing yet, but knows what is durable and what failed."""
        successor = Resources(self.options, self._store_factory, self._abandon_grace_seconds)
        lane = self.account.lane
        successor.account.lane.history = lane.history
        successor.account.failures = self.account.failures
        successor.account.lazy = self.account.lazy
        successor.attached, self.attached = self.attached, {}
        successor._predecessor = self
        return successor

    # -- acquiring

    def running(self) -> Runtime:
        """Return the runtime; acquire it first if necessary.

        Raises:
            ServiceClosedError: the service is closed, or the interpreter is ending.
            RuntimeError: called on the loop thread, as by an observer.
        """
        if self.is_closed:
            raise ServiceClosedError("the service has been closed; make a new one")
        runtime = self._runtime
        if runtime is None:
            runtime = self._runtime = runtimes.acquire(self._runtime_user)
            if self.is_closed:  # meanwhile, by a signal handler or another thread
                self._runtime = None
                runtimes.release(runtime, self._runtime_user)
                raise ServiceClosedError("the service was closed meanwhile")
        runtime.refuse_loop_thread()
        return runtime

    def held(self) -> Runtime | None:
        """Return the runtime if it has been acquired, even if acquiring it was interrupted."""
        if self._runtime is None:
            self._runtime = runtimes.held_by(self._runtime_user)
        return self._runtime

    def store(self, location: Location) -> Store:
        """Return the store for *location*; make it first if necessary."""
        store = self._stores.get(location.group)
        if store is None:
            self.running()
            make = self._store_factory or self._open_store
            store = self._stores.setdefault(location.group, make(location, self.workers))
        return store

    def writer(self, location: Location) -> StreamingWriter:
        """Return our own writer for *location*; all requests of the same store share it."""
        store = self.store(location)
        writer = self._writers.get(location.group)
        if writer is None:
            writer = self._writers.setdefault(
                location.group, StreamingWriter(store, self.workers, self.options, pool=self.account.pool)
            )
        return writer

    def _open_store(self, location: Location, workers: Workers) -> Store:
        options = self.options
        return open_store(
            location,
            workers=workers,
            storage_options=options.storage_options,
            durability=options.durability,
            retry=options.retry,
            overwrite=options.overwrite,
            in_place=options.in_place,
            page_cache=options.page_cache,
            part_size=options.part_size_bytes,
            max_concurrent_parts=options.max_concurrent_parts,
        )

    @property
    def is_held(self) -> bool:
        """Whether there is anything to release."""
        return self.held() is not None or self._predecessor is not None

    # -- requests in progress

    def is_idle(self) -> bool:
        """Return whether it is acquired and open, nothing is in progress, and there is no failure to report."""
        runtime = self.held()
        if runtime is None or self.is_closed or self.account.failures:
            return False
        return runtime.call(runtime.dispatcher.is_idle, self.account)

    def drained(self) -> tuple[Outcome[None], list[Handle]]:
        """Return an outcome that is set when everything that has been accepted so far has ended.

        Also return the handles of requests that it does not include, because they have to wait for a call that is
        suspended on this thread (L1).
        """
        runtime = self.held()
        if runtime is not None:
            with suppress(ServiceClosedError):  # another thread has just closed it
                thread = threading.get_ident()
                return runtime.call(runtime.dispatcher.drain, self.account, thread=thread)
        nothing: Outcome[None] = Outcome()
        nothing.set_result(None)
        return nothing, []

    def pending(self) -> tuple[Handle, ...]:
        """Return the handles of pending requests, oldest first."""
        runtime = self.held()
        handles: list[Handle] = []
        if runtime is not None:
            with suppress(ServiceClosedError):
                handles = runtime.call(runtime.dispatcher.handles, self.account)
        return tuple(handle for handle in handles if not handle.done())

    def pending_urls(self) -> str:
        """Return the locations of pending requests, for messages."""
        return ", ".join(repr(handle.shown_url) for handle in self.pending())

    def patience(self, limit: Limit | None = None, **options: Any) -> Patience:
        """Return a wait for pending requests that begins now; the options give the default of *limit*."""
        return Patience(limit or self.options.limit(None), self._progress_seconds, **options)

    def _progress_seconds(self) -> float:
        runtime = self.held()
        if runtime is not None:
            with suppress(ServiceClosedError):  # another thread has just closed it
                return runtime.call(runtime.dispatcher.progress_seconds, self.account)
        return -math.inf

    def timeout_error(self, patience: Patience) -> FlushTimeoutError:
        """Return the error to raise when *patience* has run out."""
        what = f"still pending{patience.told}; they go on until their service is closed"
        return FlushTimeoutError(f"{what}: {self.pending_urls()}")

    def deadlock_error(self, held_up: Sequence[Handle]) -> FlushTimeoutError:
        """Return the error to raise when only *held_up* are pending, for which waiting would never end."""
        urls = ", ".join(repr(handle.shown_url) for handle in held_up)
        return FlushTimeoutError(
            f"cannot end before the call that this signal handler interrupted; wait after the handler: {urls}"
        )

    # -- releasing

    def close_predecessor(self, limit: Limit) -> None:
        """Close the one that this replaced; again, if that was interrupted."""
        predecessor = self._predecessor
        if predecessor is not None:
            predecessor.close(limit)
            self._predecessor = None

    def close(self, limit: Limit) -> None:
        """Wait for pending requests, abandon those that do not end within *limit*, and release everything."""
        self.close_predecessor(limit)
        runtime = self.held()
        if runtime is not None:
            runtime.refuse_loop_thread()
        self.is_closed = True
        if runtime is None:
            return
        stuck = False
        with suppress(ServiceClosedError):  # the loop has ended: this call repeats one that was interrupted
            drained = runtime.call(runtime.dispatcher.close, self.account, thread=threading.get_ident())
            patience = self.patience(limit)
            try:
                patience.wait(drained)
            except TimeoutError:
                stuck = self._abandon(runtime, f"given up{patience.told}, because its service was closed")
        self._free(runtime, stuck=stuck)

    def drain_at_exit(self) -> bool:
        """End everything because the interpreter exits (D4); print unreported failures (E1)."""
        limit = self.options.limit(None)
        seconds = min(limit.idle_seconds, limit.total_seconds)
        try:
            try:
                try:
                    self.drained()[0].result(min(seconds, SILENT_EXIT_SECONDS))
                except TimeoutError:
                    bound = (
                        f"for at most {seconds:g} s"
                        if seconds == limit.total_seconds
                        else f"until there is no progress for {seconds:g} s"
                    )
                    tell(f"waiting for {self.pending_urls()}, {bound}; Ctrl-C gives up")
                self.close(limit)
            except KeyboardInterrupt:
                tell("interrupted: pending checkpoints are given up")
                self.close(Limit.hard(0.0))
        except BaseException:  # Ctrl-C once more
            tell(f"pending checkpoints were not ended, because of an error:\n{traceback.format_exc()}")
            return False
        return not self.account.failures.print_at_exit()

    def _abandon(self, runtime: Runtime, reason: str) -> bool:
        """Abandon pending requests; return whether a thread is stuck in storage and was left behind."""
        stopped = runtime.call(runtime.dispatcher.cancel_all, self.account, reason)
        try:
            stopped.result(self._abandon_grace_seconds)
        except TimeoutError:
            runtime.call(runtime.dispatcher.abandon_all, self.account)
            return True
        return False

    def _free(self, runtime: Runtime, *, stuck: bool) -> None:
        # Each step may run twice: on two threads, or again after an interruption.
        until = monotonic() + FREE_SECONDS
        try:
            with suppress(ServiceClosedError):  # another thread was faster
                ended = self.loads.end()  # whatever else hangs, loads are ended
                if not stuck:
                    # Closing a store may end a read that hangs.
                    closed = runtime.call_async(_close_all, self.attached, self._stores)
                    stuck = not (_in_time(closed, until) and ended)
                runtime.call(self.account.pool.close)
        finally:
            left = 0.0 if stuck else max(0.0, until - monotonic())
            stuck = not all([self.copiers.close(left), self.workers.close(left)])
            runtimes.release(runtime, self._runtime_user, seconds=0.0 if stuck else left)
            self._runtime = None

    def retire(self) -> bool:
        """Like `close`, for a service that was garbage collected: without waiting, and without a deadline.

        The garbage collector may call this at any line of any thread, so nothing here waits, not even for a lock.

        Returns:
            Whether there was anything to release.
        """
        if self._predecessor is not None:
            self._predecessor.retire()
        runtime = self.held()
        if runtime is None:
            return False
        self.is_closed = True
        self._runtime_user.keep(self)
        try:
            runtime.spawn(self._retire)
        except ServiceClosedError:  # the loop has ended, and everything on it
            self._runtime_user.let_go()
        return True

    async def _retire(self) -> None:
        """Wait for pending requests and release everything, on the loop thread."""
        runtime = self._runtime
        if runtime is None:  # the exit was faster
            return
        try:
            await await_outcome(runtime.dispatcher.close(self.account, thread=0))
            await _close_all(self.attached, self._stores)
            self.account.pool.close()
        except Exception:
            with suppress(Exception):  # of the program's own log handlers
                logger.exception("a service that was dropped could not be closed")
        finally:
            self.copiers.close(0.0)
            self.workers.close(0.0)
            runtimes.report_at_exit(self.account.failures)
            await runtimes.leave(runtime, self._runtime_user)
            self._runtime_user.let_go()
            self._runtime = None


def _in_time(outcome: Outcome[None], until: float) -> bool:
    """Return whether *outcome* is set before the time *until*."""
    try:
        outcome.exception(until - monotonic())
    except TimeoutError:
        return False
    return True


async def _close_all(attached: dict[str, Closable], stores: dict[str, Store]) -> None:
    while attached or stores:
        _, each = attached.popitem() if attached else stores.popitem()
        try:
            with anyio.move_on_after(FREE_SECONDS):
                await each.aclose()
        except Exception as error:
            with suppress(Exception):  # of the program's own log handlers
                logger.error("a store could not be closed", exc_info=presentable(error))
