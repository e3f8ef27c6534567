"""Runs operations: one task for each save, and a few tasks for all removals and links of a service.

Guarantees: each operation that is started is reported once, unless it is abandoned before it begins. No exception of an
operation reaches the loop. At most `MOST_REMOVALS` removals and links of a service run at a time (B2).

What does not belong here: which operation may run (queue), what its end means for others (dispatch), how bytes are
written (writers, stores).
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
from anyio.abc import TaskGroup

from async_ckpt.engine.queue import REMOVE, SAVE
from async_ckpt.engine.request import Account, Request
from async_ckpt.engine.writers import Linker
from async_ckpt.errors import AbandonedError, StateChangedError
from async_ckpt.events import Writing
from async_ckpt.handle import State
from async_ckpt.system.priority import background
from async_ckpt.telemetry.patience import moving

__all__ = ["LATE_BYTES_A_SECOND", "LATE_SECONDS", "MOST_REMOVALS", "Executor"]

logger = logging.getLogger(__name__)

MOST_REMOVALS = 16
"""How many removals and links of one service run at a time: enough to keep the connections of a store busy."""

LATE_SECONDS = 5.0
LATE_BYTES_A_SECOND = 100e6
"""After this long, and what its bytes take at this rate, a save that training goes before is late."""


class Executor:
    """Runs operations on the loop.

    Args:
        tasks: the task group that runs them.
        ended: called when a request has ended, with the request, the length of its file, and its error if it failed.
    """

    def __init__(self, tasks: TaskGroup, ended: Callable[[Request, int, Exception | None], object]) -> None:
        self._tasks = tasks
        self._ended = ended

    def start(self, request: Request) -> None:
        """Schedule *request*."""
        account = request.account
        if request.op.kind is SAVE:
            self._tasks.start_soon(self._run_save, request)
            return
        account.removals.append(request)
        if account.removers < MOST_REMOVALS:
            account.removers += 1
            self._tasks.start_soon(self._run_removals, account)

    def copy(self, request: Request) -> None:
        """Schedule what the snapshot of *request* has left to be copied: soon, whether or not it may run."""
        self._tasks.start_soon(_copy, request)

    async def _run_save(self, request: Request) -> None:
        with moving(request.account.progress), _giving_way(request), anyio.CancelScope() as scope:
            await self._run(request, scope)

    async def _run_removals(self, account: Account) -> None:
        """Run waiting removals one after the other: creating a task costs more than removing a file."""
        with moving(account.progress):
            while account.removals:
                with anyio.CancelScope() as scope:
                    while account.removals and not scope.cancel_called:
                        await self._run(account.removals.popleft(), scope)
        account.removers -= 1

    async def _run(self, request: Request, scope: anyio.CancelScope) -> None:
        if request.is_over:  # it was abandoned before it began
            return
        request.scope = scope
        error: Exception | None = None
        nbytes = 0
        try:
            nbytes = await _carry_out(request)
        except anyio.get_cancelled_exc_class():
            if request.abandoned_because and not request.is_over:
                self._ended(
                    request, 0, AbandonedError(f"{request.location.url!r}: {request.abandoned_because}")
                )
            raise
        except BaseException as raised:  # a SystemExit would end the loop
            error = _failure_of(request, raised)
        if not request.is_over:  # else it was left behind, and has already been reported
            self._ended(request, nbytes, error)


@contextmanager
def _giving_way(request: Request) -> Iterator[None]:
    """Have training go before a save, where its service says so, until the save is late."""
    if not request.account.gives_way:
        yield
        return
    seconds = LATE_SECONDS + request.op.nbytes / LATE_BYTES_A_SECOND
    loop = asyncio.get_running_loop()
    with background() as work:
        late = loop.call_later(seconds, work.hurry)
        try:
            yield
        finally:
            late.cancel()


async def _copy(request: Request) -> None:
    later = None if request.snapshot is None else request.snapshot.later
    if later is None:  # it has ended
        return
    with _giving_way(request):
        try:
            await request.account.copiers.run(later.copy)
        except Exception:  # no thread, or no memory: the optimizer, or the save, will copy
            logger.debug("a snapshot is not copied ahead", exc_info=True)


async def _carry_out(request: Request) -> int:
    """Carry out *request*; return the length of the file, or 0 if there is none or it is unknown."""
    writer = request.writer
    assert writer is not None
    if isinstance(writer, Linker):
        await writer.link(request.location)
        return 0
    if request.op.kind is REMOVE:
        await writer.delete(request.location)
        return 0
    assert request.snapshot is not None
    request.handle._state = State.WRITING
    request.emit(Writing)
    try:
        if request.snapshot.has_to_be_completed:
            await request.account.copiers.run(request.snapshot.complete)
        return await writer.write(request.snapshot, request.location, request.emit)
    except StateChangedError as error:
        request.account.lazy.turn_off(str(error))
        raise


def _failure_of(request: Request, raised: BaseException) -> Exception:
    """Return the error to report: the one that was raised, or a substitute for a ``BaseException``."""
    _forget_locals(raised)
    if isinstance(raised, Exception):
        return raised
    error = AbandonedError(f"{request.location.url!r}: ended by {type(raised).__name__}: {raised}")
    error.__cause__ = raised
    return error


def _forget_locals(error: BaseException) -> None:
    """Clear the frames of the tracebacks: their variables would keep the snapshot's memory, uncounted (B1)."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            chain += [link.__cause__, link.__context__]
            chain += getattr(link, "exceptions", ())  # of a group
