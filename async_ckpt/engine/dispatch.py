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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from time import monotonic

import anyio
from anyio.abc import TaskGroup

from async_ckpt.engine.queue import (
    Action,
    Admit,
    Cancel,
    Drop,
    Kind,
    Op,
    Phase,
    Queue,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.engine.request import Account, Request
from async_ckpt.engine.writers import Linker
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
    Writing,
)
from async_ckpt.handle import Failure, Handle, Outcome, Report, State, hopeless
from async_ckpt.snapshot import Snapshot
from async_ckpt.stores.base import Location
from async_ckpt.telemetry.patience import moving

__all__ = ["Dispatcher"]

logger = logging.getLogger(__name__)

_ids = count(1)


class Dispatcher:
    """The requests under way, and the queue that decides about them."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._queue = Queue()
        self._requests: dict[int, Request] = {}
        self.expected: set[Request] = set()  # sent here and not ended; callers add to it
        self._foreseen: set[Request] = set()  # they have their place, and have not come in
        self._comparing: set[Request] = set()  # they have borrowed memory, and have not come in
        self._drains: list[tuple[set[int], Outcome[None]]] = []

    # -- messages from callers

    def lend(self, request: Request, lender: Request, snapshot: Snapshot) -> bool:
        """Let *request*, not taken in yet, hold the memory of *snapshot*; return whether that is still there."""
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
            self._pump()

    def changes(self, names: Iterable[str]) -> dict[str, str | None]:
        """Tell which of *names* are about to become something else: a link to another key, or no link."""
        found: dict[str, str | None] = {}
        for name in names:
            op = self._queue.changing(name)
            if op is not None:
                found[name] = op.target if op.kind is Kind.LINK and op.key == name else None
        return found

    def is_changing(self, location: Location) -> bool:
        """Return whether something pending may change whether *location* can be saved to."""
        return self._queue.is_changing(location.key)

    def foresee(self, request: Request) -> None:
        """Give a save its place that a signal handler on its thread has interrupted before it has come in (L1).

        What the handler asks for next may have to come after it; it is let in, whatever is there by then.
        """
        if request.account.closed or request.op.id:  # it has come in, or has its place
            return
        self._foreseen.add(request)
        self._number(request)
        self._queue.foresee(request.op)

    def take_in(self, request: Request) -> None:
        """Queue a new request; ``request.admitted`` tells when its caller may go on."""
        if request.turned_away:  # before it came in
            self.expected.discard(request)
            self.take_back(request)
            return
        if request in self._foreseen:
            self._foreseen.remove(request)
            self._comparing.discard(request)
            self._admit(request)
            return
        if request.account.closed or self._queue.one_waits(request.account.lane):
            # First come, first served: a save that waits for that memory would wait for ever for one behind it.
            self.take_back(request)
        self._comparing.discard(request)
        if request.account.closed:
            self.expected.discard(request)
            closed = ServiceClosedError("the service was closed meanwhile")
            request.handle._state = State.DROPPED
            request.admitted.set_exception(closed)
            request.outcome.set_exception(closed)
            return
        self._number(request)
        if request.borrows:
            request.op.nbytes = 0
        self._queue.add(request.op)
        if request.op.kind is Kind.LOAD and self.is_held_up(request.op, request.op.thread):
            request.admitted.set_exception(hopeless(request.location.url))
            self.withdraw(request)
            return
        if any(
            other.account is request.account and other.op.thread == request.op.thread
            for other in self._comparing
        ):
            request.op.urgent = True  # it interrupted that one, whose memory comes free only after it (L1)
        self._pump()

    def _number(self, request: Request) -> None:
        request.op.id = next(_ids)  # here, so that ids rise in the order in which threads come through
        request.handle._loop_thread = threading.get_ident()
        self._requests[request.op.id] = request

    def staged(self, request: Request, snapshot: Snapshot) -> None:
        """The snapshot is complete; from here on the save is the service's own affair."""
        if request.op.id not in self._requests:  # turned away meanwhile
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
            self.expected.discard(request)
            self.take_back(request)
            return
        if handed_over:
            return
        if request in self._foreseen:
            self._foreseen.remove(request)
        elif op.phase is Phase.STAGING:
            request.emit(Abandoned)
        self._queue.withdraw(op)
        self._forget(request)
        self._pump()

    def is_held_up(self, op: Op, thread: int) -> bool:
        """Return whether *op* cannot end before *thread* goes on with a call that is suspended there (L1)."""
        return op.id in self._requests and self._queue.is_held_up(op, thread)

    def expect_drained(self, account: Account, *, thread: int) -> tuple[Outcome[None], list[Handle]]:
        """Return an outcome that is set when everything that *account* has accepted so far has ended.

        And the handles of what it does not stand for, as it comes after a call that is suspended on *thread* (L1).
        """
        accepted = [
            op
            for op in self._queue.live(account.lane)
            if op.kind is not Kind.LOAD and op.phase in (Phase.QUEUED, Phase.RUNNING)
        ]
        held_up = {op.id for op in accepted if self._queue.is_held_up(op, thread)}
        drained = self._expect(op.id for op in accepted if op.id not in held_up)
        return drained, [self._requests[number].handle for number in held_up]

    def close(self, account: Account, *, thread: int) -> Outcome[None]:
        """Let nothing more in; return an outcome that is set when everything of *account* has ended.

        A caller that waits for admission, or to load, is turned away, and so is one whose snapshot cannot be
        completed because it is suspended on *thread*, beneath the one that closes (L1).
        """
        account.closed = True
        for request in self._live(account):
            op = request.op
            waits = (
                op.phase is Phase.WAITING
                or (op.kind is Kind.LOAD and op.phase is Phase.QUEUED)
                or request in self._foreseen
            )
            if waits or (op.phase is Phase.STAGING and op.thread == thread):
                request.decide()
                if waits:
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

    def moved_seconds(self, account: Account) -> float:
        """Tell when something last got on that *account* waits for: its own, or another's that it is behind."""
        lanes = self._queue.lanes_met(account.lane)
        accounts = {request.account for request in self._requests.values() if request.account.lane in lanes}
        return max(each.progress.seconds for each in accounts | {account})

    def is_idle(self, account: Account) -> bool:
        """Return whether nothing is under way, loads and who waits to be let in included."""
        return not any(True for _ in self._queue.live(account.lane))

    def cancel_all(self, account: Account, reason: str) -> Outcome[None]:
        """End everything of *account*; return an outcome that is set when what was running has cleaned up."""
        running = []
        for request in self._live(account):
            op = request.op
            if op.phase is Phase.RUNNING and op.kind is not Kind.LOAD:
                request.given_up = reason
                if request.scope is not None:
                    request.scope.cancel()
                running.append(op.id)
            elif op.phase is Phase.STAGING and request.decide():
                self._turn_away(request)
            elif op.kind is not Kind.LOAD:  # queued, or about to be
                self._fail(request, AbandonedError(f"{request.location.url!r}: {reason}"))
        self._pump()
        return self._expect(running)

    def _live(self, account: Account) -> Iterator[Request]:
        """Yield what has not ended, not even by what was done about an earlier one."""
        for op in list(self._queue.live(account.lane)):
            if op.id in self._requests:
                yield self._requests[op.id]

    def _turn_away(self, request: Request) -> None:
        request.turned_away = True
        self.withdraw(request)

    def leave_behind(self, account: Account) -> None:
        """End the requests of *account* whose work did not even stop when told to."""
        for request in self._live(account):
            op = request.op
            if op.kind is not Kind.LOAD:
                self._fail(request, AbandonedError(f"{request.location.url!r}: its storage does not answer"))
        self._pump()

    # -- carrying out

    def _pump(self) -> None:
        while (action := self._queue.decide(self._fits)) is not None:
            self._carry_out(action)

    def _fits(self, op: Op, instead_of: Op | None) -> bool:
        request = self._requests[op.id]
        without = None if instead_of is None else self._requests[instead_of.id].buffer
        return request.borrows or request.account.pool.would_fit(op.nbytes, without=without)

    def _carry_out(self, action: Action) -> None:
        request = self._requests[action.op.id]
        match action:
            case Admit():
                self._admit(request)
            case Refuse(_, lacking):
                self._refuse(request, request.refusal(lacking))
            case Supersede(op, by) | Cancel(op, by):
                self._queue.replaced(op, by)
                superseded = isinstance(action, Supersede)
                error = request.replacement(superseded=superseded)
                request.emit(Superseded if superseded else Cancelled)
                self._finish(request, State.SUPERSEDED if superseded else State.CANCELLED, error)
            case Drop(op, _):
                done = "linked" if op.kind is Kind.LINK else "deleted"
                message = f"{request.location.url!r} was not {done}: a save before it did not become durable"
                self._drop(request, RemovalDroppedError(message))
            case Start(op):
                op.phase = Phase.RUNNING
                if op.kind is Kind.LOAD:
                    request.admitted.set_result(None)
                else:
                    self._tasks.start_soon(self._run, request)

    def _admit(self, request: Request) -> None:
        op = request.op
        if not request.borrows:
            try:
                request.buffer = request.account.pool.lease(op.nbytes, force=True)
            except (OSError, MemoryError) as error:  # the limit allows it, the system does not
                self._refuse(request, request.refusal(str(error)))
                return
        op.phase = Phase.STAGING
        request.emit(Accepted, nbytes=op.nbytes)
        request.admitted.set_result(None)

    def _refuse(self, request: Request, refusal: Exception) -> None:
        self._queue.withdraw(request.op)
        self._forget(request)
        request.admitted.set_exception(refusal)

    async def _run(self, request: Request) -> None:
        """Run a save or a removal to its end; nothing that it raises may reach the loop."""
        error: Exception | None = None
        nbytes = 0
        with anyio.CancelScope() as request.scope:
            if request.given_up:
                request.scope.cancel()
            try:
                with moving(request.account.progress):
                    nbytes = await self._work(request)
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as raised:  # a SystemExit would end the loop
                error = _failure_of(request, raised)
        if request.op.id not in self._requests:
            return  # it was left behind, and has been reported as such
        if request.scope.cancelled_caught:
            error = AbandonedError(f"{request.location.url!r}: {request.given_up}")
        if isinstance(error, RemovalDroppedError) and request.op.kind is Kind.REMOVE:
            self._drop(request, error)
        elif error is not None:
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

    def _drop(self, request: Request, error: RemovalDroppedError) -> None:
        """End a removal, or a link, that is not carried out; it is told, and stops nobody."""
        self._queue.withdraw(request.op)
        with suppress(Exception):  # of the program's own log handlers
            logger.warning("%s", error)
        request.emit(RemovalDropped)
        self._finish(request, State.DROPPED, error)

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
        self.expected.discard(request)
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
            if request.account.closed:  # nobody else will look after it
                request.account.pool.close()

    def _out_of_the_way(self, request: Request) -> None:
        for remaining, drained in self._drains:
            remaining.discard(request.op.id)
            if not remaining:
                drained.set_result(None)
        self._drains = [drain for drain in self._drains if drain[0]]

    def _expect(self, ids: Iterable[int]) -> Outcome[None]:
        remaining = set(ids)
        drained: Outcome[None] = Outcome()
        if remaining:
            self._drains.append((remaining, drained))
        else:
            drained.set_result(None)
        return drained


def _failure_of(request: Request, raised: BaseException) -> Exception:
    """Return what to fail with: what was raised, if it is an ordinary error."""
    _forget_locals(raised)
    if isinstance(raised, Exception):
        return raised
    error = AbandonedError(f"{request.location.url!r}: ended by {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error


def _forget_locals(error: BaseException) -> None:
    """Empty the frames of the tracebacks: their variables would keep the snapshot's memory, uncounted (B1)."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
            chain += getattr(link, "exceptions", ())  # of a group
