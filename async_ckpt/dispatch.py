"""Carries out what the queue decides, for all services of the process. Everything here runs on the loop thread.

Guarantees: a request ends exactly once, in ``_finish`` (D4); its memory goes back when its bytes are no longer
needed; its error goes to whoever waits on its handle, else to its service (E1). Being on one thread, it needs
no lock.

What does not belong here: which operation may run (queue), how bytes are written (writers, stores), what a
caller is told (service).
"""

from __future__ import annotations

import logging
import threading
import traceback
from itertools import count
from time import monotonic
from typing import Any

import anyio
from anyio.abc import TaskGroup

from async_ckpt.errors import (
    AbandonedError,
    CancelledSaveError,
    MemoryLimitError,
    QueueFullError,
    RemovalDroppedError,
    ServiceClosedError,
    SupersededError,
)
from async_ckpt.events import (
    Abandoned,
    Accepted,
    Cancelled,
    Durable,
    Event,
    Failed,
    Linked,
    Observer,
    RemovalDropped,
    Removed,
    Staged,
    Superseded,
    Writing,
)
from async_ckpt.failures import Failures
from async_ckpt.handle import Failure, Handle, Outcome, Report, State
from async_ckpt.queue import (
    Action,
    Admit,
    Cancel,
    Drop,
    Kind,
    Lane,
    Op,
    Phase,
    Queue,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.snapshot import HostBuffer, HostPool, Snapshot
from async_ckpt.stores.base import Location
from async_ckpt.writers import Linker, Writer

__all__ = ["Account", "Dispatcher", "Request"]

logger = logging.getLogger(__name__)

_ids = count(1)


class Account:
    """One service as the dispatcher knows it."""

    def __init__(self, lane: Lane, pool: HostPool, observer: Observer | None, failures: Failures) -> None:
        self.lane = lane
        self.pool = pool
        self.observer = observer
        self.failures = failures
        self.closed = False
        self.newest: tuple[Request, Snapshot] | None = None  # staged; its memory may serve another save


class Request:
    """One operation from its arrival to its end; the handle is its public half."""

    def __init__(self, op: Op, account: Account, location: Location, writer: Writer | Linker | None) -> None:
        self.op = op
        self.account = account
        self.location = location
        self.writer = writer
        self.outcome: Outcome[Report] = Outcome()
        self.handle = Handle(location.url, self.outcome)
        self.admitted: Outcome[None] = Outcome()
        self.buffer: HostBuffer | None = None
        self.borrows = False  # the buffer, which is another save's
        self.snapshot: Snapshot | None = None
        self.scope: anyio.CancelScope | None = None  # of the task that runs it
        self.given_up = False  # because the service is closed
        self.started_seconds = monotonic()
        self.stall_seconds = 0.0
        self.staged_at_seconds = 0.0  # since the epoch

    def emit(self, event: type[Event], **values: Any) -> None:
        """Tell the service's observer; what it raises goes no further."""
        observer = self.account.observer
        if observer is None:
            return
        try:
            observer(event(request_id=self.op.id, url=self.location.url, **values))
        except BaseException:  # a SystemExit would end the loop
            logger.exception("the observer failed on %s of %r", event.__name__, self.location.url)


class Dispatcher:
    """The requests under way, and the queue that decides about them."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._queue = Queue()
        self._requests: dict[int, Request] = {}
        self._comparing: set[Request] = set()  # they have borrowed memory, and have not come in
        self._drains: list[tuple[set[int], Outcome[None]]] = []

    # -- messages from callers

    def lend(self, request: Request, lender: Request, snapshot: Snapshot) -> bool:
        """Let *request*, not taken in yet, hold the memory of *snapshot*; tell whether that is still there."""
        if lender.snapshot is not snapshot or lender.buffer is None:
            return False
        request.account.pool.share(lender.buffer)
        request.buffer = lender.buffer
        request.borrows = True
        self._comparing.add(request)
        return True

    def take_back(self, request: Request) -> None:
        """End what `lend` began; where nothing was lent, do nothing."""
        self._comparing.discard(request)
        if request.borrows:
            self._return_memory(request)
            if request.account.closed:  # nobody else will look after it
                request.account.pool.close()
            self._pump()

    def _one_waits(self, account: Account) -> bool:
        return any(op.phase is Phase.WAITING for op in self._queue.live(account.lane))

    def take_in(self, request: Request) -> None:
        """Queue a new request; ``request.admitted`` tells when its caller may go on."""
        if request.account.closed or self._one_waits(request.account):
            # First come, first served: who waits for that memory would wait for ever for who is behind it.
            self.take_back(request)
        self._comparing.discard(request)
        if request.account.closed:
            closed = ServiceClosedError("the service was closed meanwhile")
            request.admitted.set_exception(closed)
            request.outcome.set_exception(closed)
            return
        request.op.id = next(_ids)  # here, so that ids rise in the order in which threads come through
        request.handle._loop_thread = threading.get_ident()
        self._requests[request.op.id] = request
        if request.borrows:
            request.op.nbytes = 0
        self._queue.add(request.op)
        if any(
            other.account is request.account and other.op.thread == request.op.thread
            for other in self._comparing
        ):
            request.op.urgent = True  # it interrupted that one, whose memory comes free only after it (L1)
        self._pump()

    def staged(self, request: Request, snapshot: Snapshot) -> None:
        """The snapshot is complete; from here on the save is the service's own affair."""
        if request.op.id not in self._requests:  # closed by a signal handler that interrupted the caller
            request.outcome.set_exception(
                ServiceClosedError("the service was closed while it took the snapshot")
            )
            return
        request.snapshot = snapshot
        request.op.phase = Phase.QUEUED
        request.emit(Staged, stall_seconds=request.stall_seconds, time_seconds=request.staged_at_seconds)
        self._pump()

    def withdraw(self, request: Request) -> None:
        """The caller of an unfinished request has gone: interrupted while it waited, or done reading."""
        op = request.op
        handed_over = op.kind is Kind.SAVE and op.phase not in (Phase.WAITING, Phase.STAGING)
        if op.id not in self._requests:
            self.take_back(request)
            return
        if handed_over:
            return
        if op.phase is Phase.STAGING:
            request.emit(Abandoned)
        self._queue.withdraw(op)
        self._forget(request)
        self._pump()

    def expect_drained(self, account: Account) -> Outcome[None]:
        """Return an outcome that is set when everything that *account* has accepted so far has ended."""
        return self._expect(
            op.id
            for op in self._queue.live(account.lane)
            if op.kind is not Kind.LOAD and op.phase in (Phase.QUEUED, Phase.RUNNING)
        )

    def close(self, account: Account, *, thread: int) -> Outcome[None]:
        """Let nothing more in; return an outcome that is set when everything of *account* has ended.

        A caller that waits for admission is turned away, and so is one whose snapshot cannot be completed
        because it is suspended on *thread*, beneath the one that closes (L1).
        """
        account.closed = True
        for op in list(self._queue.live(account.lane)):
            request = self._requests[op.id]
            if op.phase is Phase.WAITING or (op.phase is Phase.STAGING and op.thread == thread):
                if op.phase is Phase.WAITING:
                    request.admitted.set_exception(ServiceClosedError("the service was closed meanwhile"))
                self._turn_away(request)
        return self._expect(op.id for op in self._queue.live(account.lane) if op.kind is not Kind.LOAD)

    def handles(self, account: Account) -> list[Handle]:
        """Return the handles of what *account* has accepted and not ended, oldest first."""
        live = [
            op
            for op in self._queue.live(account.lane)
            if op.kind is not Kind.LOAD and op.phase is not Phase.WAITING
        ]
        return [self._requests[op.id].handle for op in live]

    def is_idle(self, account: Account) -> bool:
        """Tell whether nothing of *account* is under way, loads and who waits to be let in included."""
        return not any(True for _ in self._queue.live(account.lane))

    def cancel_all(self, account: Account, reason: str) -> Outcome[None]:
        """End everything of *account*; return an outcome that is set when what was running has cleaned up."""
        running = []
        for op in list(self._queue.live(account.lane)):
            request = self._requests[op.id]
            if op.phase is Phase.RUNNING and op.kind is not Kind.LOAD:
                request.given_up = True
                if request.scope is not None:
                    request.scope.cancel()
                running.append(op.id)
            elif op.phase is Phase.STAGING:
                self._turn_away(request)
            elif op.phase is Phase.QUEUED and op.kind is not Kind.LOAD:
                self._fail(request, AbandonedError(f"{request.location.url!r}: {reason}"))
        self._pump()
        return self._expect(running)

    def _turn_away(self, request: Request) -> None:
        request.given_up = True  # seen by its caller, which must not return a handle
        self.withdraw(request)

    def leave_behind(self, account: Account) -> None:
        """End the requests of *account* whose work did not even stop when told to."""
        for op in list(self._queue.live(account.lane)):
            request = self._requests[op.id]
            if op.kind is not Kind.LOAD:
                self._fail(request, AbandonedError(f"{request.location.url!r}: its storage does not answer"))
        self._pump()

    # -- carrying out

    def _pump(self) -> None:
        while (action := self._queue.decide(self._lease)) is not None:
            self._carry_out(action)

    def _lease(self, op: Op, instead_of: Op | None) -> bool:
        request = self._requests[op.id]
        pool = request.account.pool
        if request.borrows:
            return True
        if instead_of is not None:
            return pool.would_fit(op.nbytes, without=self._requests[instead_of.id].buffer)
        request.buffer = pool.lease(op.nbytes)
        return request.buffer is not None

    def _carry_out(self, action: Action) -> None:
        request = self._requests[action.op.id]
        match action:
            case Admit(op):
                if request.buffer is None:
                    request.buffer = request.account.pool.lease(op.nbytes, force=True)
                op.phase = Phase.STAGING
                request.emit(Accepted, nbytes=op.nbytes)
                request.admitted.set_result(None)
            case Refuse(op, lacking):
                self._queue.withdraw(op)
                self._forget(request)
                request.admitted.set_exception(_refusal(request, lacking))
            case Supersede(op, by) | Cancel(op, by):
                self._queue.replaced(op, by)
                superseded = isinstance(action, Supersede)
                error = _replacement(request, superseded=superseded)
                request.emit(Superseded if superseded else Cancelled)
                self._finish(request, State.SUPERSEDED if superseded else State.CANCELLED, error)
            case Drop(op, _):
                self._queue.withdraw(op)
                done = "linked" if op.kind is Kind.LINK else "deleted"
                message = f"{request.location.url!r} was not {done}: a save before it did not become durable"
                logger.warning("%s", message)
                request.emit(RemovalDropped)
                error = RemovalDroppedError(message)
                self._finish(request, State.DROPPED, error)
            case Start(op):
                op.phase = Phase.RUNNING
                if op.kind is Kind.LOAD:
                    request.admitted.set_result(None)
                else:
                    self._tasks.start_soon(self._run, request)

    async def _run(self, request: Request) -> None:
        """Run a save or a removal to its end; nothing that it raises may reach the loop."""
        error: Exception | None = None
        nbytes = 0
        with anyio.CancelScope() as request.scope:
            if request.given_up:
                request.scope.cancel()
            try:
                nbytes = await self._work(request)
            except Exception as raised:
                error = _without_locals(raised)
        if request.op.id not in self._requests:
            return  # it was left behind, and has been reported as such
        if request.scope.cancelled_caught:
            error = AbandonedError(f"{request.location.url!r}: given up because its service was closed")
        if error is not None:
            self._fail(request, error)
        else:
            self._queue.durable(request.op)
            seconds = monotonic() - request.started_seconds
            if request.op.kind is Kind.LINK:
                request.emit(Linked)
                self._finish(request, State.DURABLE)
            elif request.op.kind is Kind.SAVE:
                request.emit(Durable, nbytes=nbytes, seconds=seconds)
                self._finish(request, State.DURABLE, nbytes=nbytes)
            else:
                request.emit(Removed)
                self._finish(request, State.REMOVED)
        self._pump()

    async def _work(self, request: Request) -> int:
        writer = request.writer
        assert writer is not None
        if isinstance(writer, Linker):
            await writer.link(request.location)
            return 0
        if request.op.kind is Kind.REMOVE:
            await writer.delete(request.location)
            return 0
        assert request.snapshot is not None
        request.handle._state = State.WRITING
        request.emit(Writing)
        return await writer.write(request.snapshot, request.location, request.emit)

    # -- the end of a request

    def _fail(self, request: Request, error: Exception) -> None:
        self._queue.failed(request.op)
        request.emit(Failed, error=error)
        failure = Failure(request.handle, error)
        request.handle._failure = failure
        request.account.failures.add(failure)
        self._finish(request, State.FAILED, error)

    def _finish(
        self, request: Request, state: State, error: Exception | None = None, nbytes: int = 0
    ) -> None:
        """The one place in which a request ends: its place and memory first, then its handle, then who drains."""
        self._give_back(request)
        request.handle._state = state
        if error is not None:
            request.outcome.set_exception(error)
        else:
            report = Report(
                url=request.location.url,
                state=state,
                nbytes=nbytes,
                stall_seconds=request.stall_seconds,
                seconds=monotonic() - request.started_seconds,
            )
            request.outcome.set_result(report)
        self._out_of_the_way(request)

    def _forget(self, request: Request) -> None:
        """End a request whose handle nobody holds."""
        self._give_back(request)
        self._out_of_the_way(request)

    def _give_back(self, request: Request) -> None:
        del self._requests[request.op.id]
        if request.snapshot is not None:
            request.snapshot.close()
            request.snapshot = None
        newest = request.account.newest
        if newest is not None and newest[0] is request:
            request.account.newest = None
        self._return_memory(request)

    def _return_memory(self, request: Request) -> None:
        if request.buffer is not None:
            request.account.pool.release(request.buffer)
            request.buffer = None
            request.borrows = False

    def _out_of_the_way(self, request: Request) -> None:
        for remaining, drained in self._drains:
            remaining.discard(request.op.id)
            if not remaining:
                drained.set_result(None)
        self._drains = [drain for drain in self._drains if drain[0]]

    def _expect(self, ids: Any) -> Outcome[None]:
        remaining = set(ids)
        drained: Outcome[None] = Outcome()
        if remaining:
            self._drains.append((remaining, drained))
        else:
            drained.set_result(None)
        return drained


def _without_locals(error: Exception) -> Exception:
    """Empty the frames of the tracebacks: their variables would keep the snapshot's memory, uncounted (B1)."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
    return error


def _refusal(request: Request, lacking: str) -> Exception:
    lane = request.op.lane
    if lacking == "queue":
        return QueueFullError(
            f"{request.location.url!r} was not accepted: {lane.queue_depth} saves are under way; "
            "raise queue_depth, or wait for one of them"
        )
    return MemoryLimitError(
        f"{request.location.url!r} was not accepted: its snapshot needs {request.op.nbytes} bytes beside those held; "
        "raise memory_limit, or wait for a save"
    )


def _replacement(request: Request, *, superseded: bool) -> Exception:
    if superseded:
        return SupersededError(
            f"a newer save of {request.location.url!r} took its place before it had started"
        )
    return CancelledSaveError(f"{request.location.url!r} was removed before its save had started")
