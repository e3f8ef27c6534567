"""The service used from asyncio and trio: nothing blocks the caller's loop, cancelling harms no save."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from async_ckpt import (
    AbandonedError,
    CheckpointService,
    FlushError,
    FlushTimeoutError,
    Report,
    State,
    StoreError,
)
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, accepted, gated, number_at, number_of, reached, state

pytestmark = pytest.mark.anyio


def failing(*calls: int) -> Fault:
    """Return the fault of a store that fails for good."""
    return Fault(operation="commit", calls=calls or None, error=lambda: StoreError("no more room"))


async def until(reached: Callable[[], Any]) -> None:
    """Let other tasks run until something has come about."""
    with anyio.fail_after(PATIENCE_SECONDS):
        while not reached():
            await anyio.lowlevel.checkpoint()


# -- waiting


async def test_await_handle() -> None:
    """An awaited handle returns its report; meanwhile the loop goes on, and any number of tasks may wait (D1)."""
    gate, hold = gated()
    reports: list[Report] = []
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")

        async def wait() -> None:
            reports.append(await handle)

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(wait)
            await until(lambda: len(handle._waiters) == 5)
            gate.open()  # by a task of the loop on which the others wait
        assert [report.state for report in reports] == [State.DURABLE] * 5
        assert (await handle) is reports[0]


async def test_await_a_failed_handle() -> None:
    """Awaiting the handle of a failed save raises the worker's error, and flush has nothing more to tell (E1)."""
    gate, hold = gated()
    with Harness(hold, failing(), memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")

        async def wait() -> None:
            with pytest.raises(StoreError, match="no more room") as raised:
                await handle
            assert "commit" in [entry.name for entry in raised.traceback]

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await until(lambda: handle.is_waited_for)
            gate.open()
            await harness.service.flush()


async def test_flush() -> None:
    """After flush everything accepted before is durable; the loop goes on meanwhile (D1)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handles = [harness.service.save(state(number), f"memory://{number}") for number in range(2)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.service.flush)
            await anyio.lowlevel.checkpoint()
            gate.open()
        assert [handle.state for handle in handles] == [State.DURABLE] * 2
        await harness.service.flush()


async def test_flush_tells_failures() -> None:
    """Flush raises what failed: one error as itself, several as a FlushError; then the service is usable (E1)."""
    with Harness(failing(1, 2, 3), memory=True) as harness:
        harness.service.save(state(1), "memory://a")
        with pytest.raises(StoreError):
            await harness.service.flush()
        gate, hold = gated()
        harness.store.add(hold)
        for url in ("memory://a", "memory://b"):
            harness.service.save(state(2), url)
        gate.open()
        with pytest.raises(FlushError) as raised:
            await harness.service.flush()
        assert len(raised.value.exceptions) == 2
        await harness.service.save(state(3), "memory://c")
        await harness.service.flush()


@pytest.mark.parametrize("timeout", [0, 0.01, None])
async def test_flush_gives_up_in_time(timeout: float | None) -> None:
    """Flush raises after its timeout, or flush_timeout, and names what is pending; the save goes on (B2)."""
    gate, hold = gated()
    with Harness(hold, memory=True, flush_timeout=0.01) as harness:
        handle = accepted(harness.service, state(1), "memory://a")
        with pytest.raises(FlushTimeoutError, match="memory://a"):
            await harness.service.flush(timeout)
        assert not handle.done()
        gate.open()
        await harness.service.flush(PATIENCE_SECONDS)
        assert handle.state is State.DURABLE


# -- cancelling


@pytest.mark.parametrize("what", ["handle", "flush"])
async def test_a_cancelled_wait_leaves_the_save_alone(what: str) -> None:
    """Cancelling a task that waits ends the waiting; the save becomes durable and is waited for by nobody (D4)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        with anyio.move_on_after(0.01) as scope:
            await (handle if what == "handle" else harness.service.flush())
        assert scope.cancelled_caught
        assert not handle.done()
        assert not handle.is_waited_for
        gate.open()
        assert (await handle).state is State.DURABLE


async def test_an_error_meant_for_a_cancelled_task_is_told_by_the_next_call() -> None:
    """A failure that comes after its waiter was cancelled is raised by the next call (E1)."""
    gate, hold = gated()
    with Harness(hold, failing(1), memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        with anyio.move_on_after(0.01):
            await handle
        gate.open()
        with pytest.raises(StoreError):
            await harness.service.flush()


# -- closing


async def test_async_with(tmp_path: Path) -> None:
    """At the end of an async with block everything is durable, and no thread of ours is left (L1, B2)."""
    async with CheckpointService() as service:
        for number in range(3):
            service.save(state(number), tmp_path / f"{number}.ckpt")
    assert [number_at(tmp_path / f"{number}.ckpt") for number in range(3)] == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("async_ckpt-loop")]
    await service.aclose()


async def test_async_with_tells_failures() -> None:
    """What failed and nobody was told of is raised at the end of an async with block (E1)."""
    with Harness(failing(), memory=True) as harness, pytest.raises(StoreError):
        async with harness.service as service:
            service.save(state(1), "memory://a")


async def test_an_error_in_flight_stays_first(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of an async with block training's own error is raised; ours is logged and in its notes (E2)."""

    async def train() -> None:
        async with harness.service as service:
            service.save(state(1), "memory://a")
            raise ZeroDivisionError("training failed")

    with Harness(failing(), memory=True) as harness:
        with pytest.raises(ZeroDivisionError) as raised:
            await train()
    assert "no more room" in caplog.text
    if sys.version_info >= (3, 11):
        assert "no more room" in raised.value.__notes__[0]


async def test_aclose_does_not_block_the_loop() -> None:
    """While aclose drains, the loop's other tasks go on: one of them lets the save pass (B2)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.service.aclose)
            await until(lambda: harness.service._resources.is_closed)
            gate.open()
        assert handle.state is State.DURABLE


async def test_aclose_abandons_at_its_deadline(tmp_path: Path) -> None:
    """What is not done at the deadline fails with AbandonedError and leaves no temporary file (D4, D2)."""
    gate, hold = gated("commit")
    harness = Harness(hold)
    handle = harness.service.save(state(1), tmp_path / "a.ckpt")
    reached(gate)
    with pytest.raises(AbandonedError):
        await harness.service.aclose(0)
    assert handle.state is State.FAILED
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("early", [True, False], ids=["before-it-began", "under-way"])
async def test_a_cancelled_aclose_goes_on(early: bool) -> None:
    """Cancelled, before or while it waits, aclose returns at once; the closing is seen to its end all the same (L1)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        with anyio.CancelScope() as scope:
            if early:
                scope.cancel()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(harness.service.aclose)
                if not early:
                    await until(lambda: harness.service._resources.is_closed)
                    scope.cancel()
        assert not handle.done()
        gate.open()
        await until(lambda: harness.service._resources.held() is None)
        assert handle.state is State.DURABLE


async def test_what_a_cancelled_aclose_cannot_tell_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A failure that shows after aclose was cancelled is logged, as there is no later call to raise it (E1)."""
    gate, hold = gated()
    with Harness(hold, failing(), memory=True) as harness:
        harness.service.save(state(1), "memory://a")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await harness.service.aclose()
        assert scope.cancelled_caught
        gate.open()
        await until(lambda: "no more room" in caplog.text)


# -- several loops


async def test_tasks_in_several_loops_share_a_service() -> None:
    """A handle may be awaited in another event loop, on another thread, than the one that saved."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        states: list[State] = []

        async def wait() -> None:
            states.append((await handle).state)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            for backend in ("asyncio", "trio"):
                tasks.start_soon(anyio.to_thread.run_sync, lambda name=backend: anyio.run(wait, backend=name))
            await until(lambda: len(handle._waiters) == 3)
            gate.open()
        assert states == [State.DURABLE] * 3


async def test_load_in_a_thread() -> None:
    """A blocking load belongs in a thread; there it waits for the pending save of its path (O2)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        harness.service.save(state(1), "memory://a")
        loaded: list[float] = []

        async def load() -> None:
            loaded.append(number_of(await anyio.to_thread.run_sync(harness.service.load, "memory://a")))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            await anyio.lowlevel.checkpoint()
            gate.open()
        assert loaded == [1]
