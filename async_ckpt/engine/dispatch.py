"""Carries out the decisions of the queue, for all services of the process. Everything here runs on the loop thread.

Guarantees: each message from a caller is answered, and messages take effect in the order of their arrival. No lock is
needed, as there is only one thread.

What does not belong here: which operation may run (queue), how it runs (execution), how a request ends (registry), what
a caller is told (service).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from time import monotonic

from anyio.abc import TaskGroup

from async_ckpt.engine.execution import Executor
from async_ckpt.engine.queue import (
    LINK,
    LOAD,
    QUEUED,
    REMOVE,
    RUNNING,
    SAVE,
    STAGING,
    WAITING,
    Action,
    Admit,
    Cancel,
    Drop,
    Op,
    Queue,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.engine.registry import Registry
from async_ckpt.engine.request import Account, Request
from async_ckpt.errors import AbandonedError, RemovalDroppedError, ServiceClosedError
from async_ckpt.events import (
    Abandoned,
    Accepted,
    Cancelled,
    Durable,
    Failed,
    Linked,
    RemovalDropped,
    Removed,
    Staged,
    Superseded,
)
from async_ckpt.handle import Handle, Outcome, State, deadlock
from async_ckpt.snapshot import Snapshot
from async_ckpt.stores.base import Location

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)

_ids = count(1)


class Dispatcher:
    """The requests in progress, and the queue that decides about them.

    Args:
        tasks: the task group that runs the operations.

    Attributes:
        registry: the requests that have not ended.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self.registry = Registry()
        self._queue = Queue()
        self._executor = Executor(tasks, self._ended)
        self._preadmitted: set[Request] = set()  # admitted before they were enqueued
        self._comparing: set[Request] = set()  # they share memory, but are not enqueued yet

    # -- messages from callers

    def share_buffer(self, request: Request, owner: Request, snapshot: Snapshot) -> bool:
        """Let *request*, which is not enqueued yet, share the memory of *snapshot*; return whether it still exists."""
        if owner.snapshot is not snapshot or owner.buffer is None:
            return False
        request.account.pool.share(owner.buffer)
        request.buffer = owner.buffer
        request.shares_buffer = True
        self._comparing.add(request)
        return True

    def unshare_buffer(self, request: Request) -> None:
        """Undo `share_buffer`; do nothing if nothing is shared."""
        self._comparing.discard(request)
        if request.shares_buffer:
            request.release_buffer()
            self._pump()

    def pending_changes(self, names: Iterable[str]) -> dict[str, str | None]:
        """Return those of *names* that will change: by name, the key that it will link to, or ``None`` for no link."""
        found: dict[str, str | None] = {}
        for name in names:
            op = self._queue.changing(name)
            if op is not None:
                found[name] = op.target if op.kind is LINK and op.key == name else None
        return found

    def is_changing(self, location: Location) -> bool:
        """Return whether a pending operation may change whether *location* can be saved to."""
        return self._queue.is_changing(location.key)

    def preadmit(self, request: Request) -> None:
        """Admit a save that a signal handler on its thread interrupted before it was enqueued (L1).

        The handler's next request may have to wait for that save, so it is admitted whatever the bounds.
        """
        if request.account.closed or request.op.id:  # it is enqueued or admitted already
            return
        self._preadmitted.add(request)
        self._number(request)
        self._queue.preadmit(request.op)

    def enqueue(self, request: Request) -> None:
        """Add a new request to the queue; ``request.admission`` is set when its caller may go on."""
        if request.rejected:  # before it came here
            self.registry.disregard(request)
            self.unshare_buffer(request)
            return
        if request in self._preadmitted:
            self._preadmitted.remove(request)
            self._comparing.discard(request)
            self._admit(request)
            return
        if request.account.closed or self._queue.has_waiting_save(request.account.lane):
            # First come, first served: an earlier save may wait for that memory, maybe forever.
            self.unshare_buffer(request)
        self._comparing.discard(request)
        if request.account.closed:
            self.registry.disregard(request)
            closed = ServiceClosedError("the service was closed meanwhile")
            request.handle._state = State.DROPPED
            request.answer(closed)
            request.outcome.set_exception(closed)
            return
        self._number(request)
        if request.shares_buffer:
            request.op.nbytes = 0
        self._queue.add(request.op)
        if request.op.kind is LOAD and self.would_deadlock(request.op, request.op.thread):
            request.answer(deadlock(request.location.url))
            self.withdraw(request)
            return
        if self._comparing and any(
            other.account is request.account and other.op.thread == request.op.thread
            for other in self._comparing
        ):
            request.op.urgent = True  # it interrupted that save, which frees its memory only afterwards (L1)
        self._pump()

    def _number(self, request: Request) -> None:
        request.op.id = next(_ids)  # here, so that ids rise in the order in which threads come through
        request.handle._loop_thread = threading.get_ident()
        self.registry.add(request)

    def staged(self, request: Request, snapshot: Snapshot) -> None:
        """Note that the snapshot is complete; from now on, the save does not depend on its caller."""
        if request not in self.registry:  # rejected meanwhile
            snapshot.close()
            return
        request.snapshot = snapshot
        request.op.phase = QUEUED
        if snapshot.later is not None:
            self._executor.copy(request)
        request.emit(Staged, stall_seconds=request.stall_seconds, time_seconds=request.staged_at_seconds)
        self._pump()

    def withdraw(self, request: Request) -> None:
        """Remove an unfinished request whose caller was interrupted as it waited, or has finished reading."""
        op = request.op
        is_staged = op.kind is SAVE and op.phase not in (WAITING, STAGING)
        if request not in self.registry:
            self.registry.disregard(request)
            self.unshare_buffer(request)
            return
        if is_staged:
            return
        if request in self._preadmitted:
            self._preadmitted.remove(request)
        elif op.phase is STAGING:
            request.emit(Abandoned)
        self._queue.withdraw(op)
        self.registry.forget(request)
        self._pump()

    def would_deadlock(self, op: Op, thread: int) -> bool:
        """Return whether *op* cannot end before *thread* goes on with a call that is suspended there (L1)."""
        return self._queue.is_live(op) and self._queue.would_deadlock(op, thread)

    def drain(self, account: Account, *, thread: int) -> tuple[Outcome[None], list[Handle]]:
        """Return an outcome that is set when everything that *account* has accepted so far has ended.

        Also return the handles of requests that it does not include, because they have to wait for a call that is
        suspended on *thread* (L1).
        """
        accepted = [
            op
            for op in self._queue.live(account.lane)
            if op.kind is not LOAD and op.phase in (QUEUED, RUNNING)
        ]
        suspended = [op for op in accepted if self._queue.would_deadlock(op, thread)]
        drained = self.registry.drain(set(accepted).difference(suspended))
        return drained, [self.registry.of(op).handle for op in suspended]

    def close(self, account: Account, *, thread: int) -> Outcome[None]:
        """Accept nothing more; return an outcome that is set when everything of *account* has ended.

        Callers that wait for admission, or to load, are rejected. So are callers that cannot complete their snapshot,
        because they are suspended on *thread*, which is closing (L1).
        """
        account.closed = True
        for request in self._live(account):
            op = request.op
            waits = (
                op.phase is WAITING
                or (op.kind is LOAD and op.phase is QUEUED)
                or request in self._preadmitted
            )
            if waits or (op.phase is STAGING and op.thread == thread):
                request.claim()
                if waits:
                    request.answer(ServiceClosedError("the service was closed meanwhile"))
                self._reject(request)
        return self.registry.drain(op for op in self._queue.live(account.lane) if op.kind is not LOAD)

    def handles(self, account: Account) -> list[Handle]:
        """Return the handles of the pending requests of *account*, oldest first."""
        live = [
            op for op in self._queue.live(account.lane) if op.kind is not LOAD and op.phase is not WAITING
        ]
        return [self.registry.of(op).handle for op in live]

    def progress_seconds(self, account: Account) -> float:
        """Return the time of the last progress of *account*, or of a request that it may be queued behind."""
        accounts = self.registry.accounts(self._queue.related_lanes(account.lane))
        return max(each.progress.seconds for each in accounts | {account})

    def is_idle(self, account: Account) -> bool:
        """Return whether nothing is in progress, including loads and saves that wait for admission."""
        return not any(True for _ in self._queue.live(account.lane))

    def cancel_all(self, account: Account, reason: str) -> Outcome[None]:
        """Abandon everything of *account*; return an outcome that is set when running operations have cleaned up."""
        running = []
        for request in self._live(account):
            op = request.op
            if op.kind is LOAD:
                continue
            if op.phase is RUNNING and request.scope is not None:
                request.abandoned_because = reason
                request.scope.cancel()
                running.append(op)
            elif op.phase is STAGING and request.claim():
                self._reject(request)
            else:  # queued, about to be queued, or not begun yet
                self._fail(request, AbandonedError(f"{request.location.url!r}: {reason}"))
        self._pump()
        return self.registry.drain(running)

    def abandon_all(self, account: Account) -> None:
        """End the requests of *account* that did not stop when they were cancelled."""
        for request in self._live(account):
            op = request.op
            if op.kind is not LOAD:
                self._fail(
                    request,
                    AbandonedError(f"{request.location.url!r} was given up: its storage does not answer"),
                )
        self._pump()

    def _live(self, account: Account) -> Iterator[Request]:
        """Yield the requests that have not ended; the body may end others of them."""
        for op in list(self._queue.live(account.lane)):
            if self._queue.is_live(op):
                yield self.registry.of(op)

    def _reject(self, request: Request) -> None:
        request.rejected = True
        self.withdraw(request)

    # -- carrying out

    def _pump(self) -> None:
        while (action := self._queue.decide(self._fits)) is not None:
            self._carry_out(action)

    def _fits(self, op: Op, instead_of: Op | None) -> bool:
        request = self.registry.of(op)
        without = None if instead_of is None else self.registry.of(instead_of).buffer
        return request.shares_buffer or request.account.pool.would_fit(op.nbytes, without=without)

    def _carry_out(self, action: Action) -> None:
        request = self.registry.of(action.op)
        match action:
            case Start(op):
                op.phase = RUNNING
                if op.kind is LOAD:
                    request.answer()
                else:
                    self._executor.start(request)
            case Admit():
                self._admit(request)
            case Refuse(_, lacking):
                self._refuse(request, request.refusal(lacking))
            case Supersede(op, by) | Cancel(op, by):
                self._queue.replaced(op, by)
                superseded = isinstance(action, Supersede)
                error = request.replacement(superseded=superseded)
                request.emit(Superseded if superseded else Cancelled)
                self.registry.finish(request, State.SUPERSEDED if superseded else State.CANCELLED, error)
            case Drop(op, _):
                done = "linked" if op.kind is LINK else "deleted"
                message = f"{request.location.url!r} was not {done}: an earlier save did not become durable"
                self._drop(request, RemovalDroppedError(message))

    def _admit(self, request: Request) -> None:
        op = request.op
        if not request.shares_buffer:
            try:
                request.buffer = request.account.pool.lease(op.nbytes, force=True)
            except (OSError, MemoryError) as error:  # the limit allows it, the system does not
                self._refuse(request, request.refusal(str(error)))
                return
        op.phase = STAGING
        request.emit(Accepted, nbytes=op.nbytes)
        request.answer()

    def _refuse(self, request: Request, refusal: Exception) -> None:
        self._queue.withdraw(request.op)
        self.registry.forget(request)
        request.answer(refusal)

    def _ended(self, request: Request, nbytes: int, error: Exception | None) -> None:
        """Note that a save, a removal or a link has ended."""
        kind = request.op.kind
        if error is not None:
            if isinstance(error, RemovalDroppedError) and kind is REMOVE:
                self._drop(request, error)
            else:
                self._fail(request, error)
        else:
            self._queue.durable(request.op)
            if kind is REMOVE:
                request.emit(Removed)
            elif kind is LINK:
                request.emit(Linked)
            else:
                request.emit(Durable, nbytes=nbytes, seconds=monotonic() - request.started_seconds)
            state = State.REMOVED if kind is REMOVE else State.DURABLE
            self.registry.finish(request, state, nbytes=nbytes)
        self._pump()

    def _drop(self, request: Request, error: RemovalDroppedError) -> None:
        """End a removal or a link without carrying it out; this is reported, but fails no other request."""
        self._queue.withdraw(request.op)
        with suppress(Exception):  # of the program's own log handlers
            logger.warning("%s", error)
        request.emit(RemovalDropped)
        self.registry.finish(request, State.DROPPED, error)

    def _fail(self, request: Request, error: Exception) -> None:
        self._queue.failed(request.op)
        request.emit(Failed, error=error)
        self.registry.fail(request, error)
