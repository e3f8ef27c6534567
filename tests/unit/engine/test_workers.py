"""The pool of threads: its bound, its end, and what it does where the system allows no more threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from async_ckpt.engine.workers import PoolWorkers
from async_ckpt.errors import AbandonedError
from tests.support import PATIENCE_SECONDS


def refuse(thread: threading.Thread) -> None:
    """Start no thread, as a system at its limit."""
    raise RuntimeError("can't start new thread")


def running(body: Callable[[], Awaitable[Any]]) -> Any:
    """Run *body* under asyncio, with a bound."""

    async def bounded() -> Any:
        with anyio.fail_after(PATIENCE_SECONDS):
            return await body()

    return asyncio.run(bounded())


def test_what_is_refused_is_never_carried_out() -> None:
    """A call that fails for want of a thread is not made later, when there is one (D3)."""
    called: list[str] = []
    starts = [refuse, threading.Thread.start]

    workers = PoolWorkers(1, start=lambda thread: starts.pop(0)(thread))

    async def body() -> None:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await workers.run(called.append, "deleted")
        await workers.run(called.append, "asked for later")

    running(body)
    assert workers.close(PATIENCE_SECONDS)
    assert called == ["asked for later"]


def test_one_thread_does_the_work_of_several() -> None:
    """Where the system allows only one, it does everything, and nothing fails."""
    starts = [threading.Thread.start]
    workers = PoolWorkers(4, start=lambda thread: (starts.pop() if starts else refuse)(thread))

    async def body() -> list[int]:
        return await asyncio.gather(*(workers.run(int, str(number)) for number in range(20)))

    assert running(body) == list(range(20))
    assert workers.close(PATIENCE_SECONDS)


def test_closing_waits_for_no_thread_that_hangs() -> None:
    """Close returns at its time; what hangs ends when it can, and may clean up after itself (B2)."""
    answers, began, order = threading.Event(), threading.Event(), list[str]()
    workers = PoolWorkers(3)

    def hang() -> None:
        began.set()
        answers.wait(PATIENCE_SECONDS)

    async def body() -> None:
        async def save() -> None:
            await workers.run(hang)
            await workers.run(order.append, "cleaned up")

        for _ in range(3):
            await workers.run(int)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save)
            await anyio.to_thread.run_sync(began.wait)
            assert not await anyio.to_thread.run_sync(workers.close, 0.0)
            order.append("closed")
            answers.set()

    running(body)
    assert workers.close(PATIENCE_SECONDS)
    assert order == ["closed", "cleaned up"]


@pytest.mark.parametrize("times", [1, 3])
def test_every_thread_ends(times: int) -> None:
    """However many threads there are, and however often it is closed, none stays, nor does one that came late (B2)."""
    for _ in range(50):
        workers = PoolWorkers(5)
        together = threading.Barrier(5)

        async def body(workers: PoolWorkers = workers, together: threading.Barrier = together) -> None:
            await asyncio.gather(*(workers.run(together.wait, PATIENCE_SECONDS) for _ in range(5)))
            workers.close(0.0)
            await asyncio.gather(*(workers.run(int) for _ in range(7)))

        running(body)
        for _ in range(times):
            assert workers.close(PATIENCE_SECONDS)


def test_cancelling_waits_for_the_call() -> None:
    """A cancelled task goes on only once its call has returned: the memory that it uses is still there."""
    workers, began, goes_on, order = PoolWorkers(1), threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        began.set()
        goes_on.wait(PATIENCE_SECONDS)
        order.append("returned")

    async def body() -> None:
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                try:
                    await workers.run(work)
                    await anyio.lowlevel.checkpoint()
                finally:
                    order.append("cancelled")

            tasks.start_soon(run)
            await anyio.to_thread.run_sync(began.wait)
            tasks.cancel_scope.cancel()
            goes_on.set()

    running(body)
    assert workers.close(PATIENCE_SECONDS)
    assert order == ["returned", "cancelled"]


def test_an_exit_in_a_worker_ends_one_save() -> None:
    """A SystemExit in a worker is an error of its call, with the exit as its cause."""
    workers = PoolWorkers(1)

    async def body() -> None:
        with pytest.raises(AbandonedError, match="SystemExit") as raised:
            await workers.run(exit, 3)
        assert isinstance(raised.value.__cause__, SystemExit)

    running(body)
    assert workers.close(PATIENCE_SECONDS)
