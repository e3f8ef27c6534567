"""The dispatcher played by hand, where the order of messages matters and threads would be left to chance."""

from __future__ import annotations

import errno
import threading

import anyio
import pytest
from anyio.abc import TaskGroup

from async_ckpt import AbandonedError, MemoryLimitError, State
from async_ckpt.engine.dispatch import Dispatcher
from async_ckpt.engine.failures import Failures
from async_ckpt.engine.queue import Kind, Op, Phase
from async_ckpt.engine.request import Account, Request
from async_ckpt.engine.workers import PoolWorkers
from async_ckpt.handle import Outcome
from async_ckpt.snapshot import HostBuffer, HostPool, Snapshot, capture
from async_ckpt.snapshot.budget import Budget
from async_ckpt.stores import locate
from tests.support import lane, state

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The loop thread's own."""
    return "asyncio"


class ExhaustedPool(HostPool):
    """Memory of which the limit leaves room and the system has none."""

    def lease(self, nbytes: int, *, force: bool = False) -> HostBuffer | None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


class Stage:
    """A dispatcher with one service, and a save whose caller is on another thread."""

    def __init__(self, tasks: TaskGroup, pool: type[HostPool] = HostPool) -> None:
        self.dispatcher = Dispatcher(tasks)
        self.account = Account(
            lane=lane(),
            pool=pool(Budget(1 << 20)),
            observer=None,
            failures=Failures(warn=False),
            copiers=PoolWorkers(1),
        )
        self._captured = capture(state(1))

    def save(self, *, thread: int = -1) -> Request:
        return self._request(Kind.SAVE, Phase.WAITING, thread, self._captured.nbytes)

    def remove(self) -> Request:
        return self._request(Kind.REMOVE, Phase.QUEUED, -2, 0)

    def _request(self, kind: Kind, phase: Phase, thread: int, nbytes: int) -> Request:
        op = Op(
            id=0, lane=self.account.lane, kind=kind, key=kind.value, phase=phase, thread=thread, nbytes=nbytes
        )
        request = Request(op, self.account, locate(f"memory://{kind.value}"), None)
        self.dispatcher.enqueue(request)
        return request

    def snapshot(self, request: Request) -> Snapshot:
        assert request.buffer is not None
        return self._captured.stage(request.buffer)

    def close(self) -> Outcome[None]:
        """Close the service from this thread, and give up what is not done."""
        self.dispatcher.close(self.account, thread=threading.get_ident())
        return self.dispatcher.cancel_all(self.account, "closed")

    def is_free(self) -> bool:
        return not self.account.pool._leased and not self.dispatcher.registry._requests


async def test_who_has_returned_its_handle_is_told_by_it() -> None:
    """A save handed over before it is given up, though taken in after that, fails: no handle stays open (D4).

    Its caller has returned the handle already, so nothing else could tell.
    """
    async with anyio.create_task_group() as tasks:
        stage = Stage(tasks)
        request = stage.save()
        snapshot = stage.snapshot(request)
        assert request.claim()  # on the caller's thread, its message under way
        stage.close()
        stage.dispatcher.staged(request, snapshot)
        assert request.handle.state is State.FAILED
        with pytest.raises(AbandonedError):
            stage.account.failures.raise_all()
        assert stage.is_free()


async def test_who_is_turned_away_returns_no_handle() -> None:
    """A save that is given up while it takes its snapshot is its caller's to refuse, and no failure (D4, E1)."""
    async with anyio.create_task_group() as tasks:
        stage = Stage(tasks)
        request = stage.save()
        snapshot = stage.snapshot(request)
        stage.close()
        stage.dispatcher.staged(request, snapshot)
        assert request.rejected
        assert not request.claim()
        assert not stage.account.failures
        assert stage.is_free()


async def test_a_system_without_memory_refuses() -> None:
    """Where the limit has room and the system has no memory, that save is refused; no other waits for it (D4, B1)."""
    async with anyio.create_task_group() as tasks:
        stage = Stage(tasks, ExhaustedPool)
        for _ in range(2):
            with pytest.raises(MemoryLimitError, match="Cannot allocate memory"):
                stage.save().admission.result(0)
        assert stage.is_free()


async def test_a_closed_service_keeps_no_memory() -> None:
    """Memory that comes back after the service has been closed is freed, not kept for the next save (B2)."""
    async with anyio.create_task_group() as tasks:
        stage = Stage(tasks)
        request = stage.save()
        stage.dispatcher.close(stage.account, thread=threading.get_ident())
        stage.dispatcher.withdraw(request)
        assert stage.account.pool.idle_bytes == 0


@pytest.mark.parametrize("beneath", [True, False])
async def test_closing_ends_what_waits_for_what_it_turns_away(beneath: bool) -> None:
    """A removal behind a save that is turned away is dropped, and closing goes on (D3, D4).

    The save is suspended beneath who closes, or is given up at the deadline.
    """
    async with anyio.create_task_group() as tasks:
        stage = Stage(tasks)
        stage.save(thread=threading.get_ident() if beneath else -1)
        removal = stage.remove()
        stopped = stage.close()
        assert stopped.done()
        assert removal.handle.state is State.DROPPED
        assert stage.is_free()
