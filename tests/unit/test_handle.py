"""The outcome of a request and the handle on it, without any service."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

from async_ckpt.errors import FlushTimeoutError
from async_ckpt.handle import Failure, Handle, Outcome, Report, State, await_outcome
from tests.support import PATIENCE_SECONDS

REPORT = Report(url="a", state=State.DURABLE)


def settled(error: Exception | None = None) -> Handle:
    """Return a handle whose request has ended."""
    outcome: Outcome[Report] = Outcome()
    if error is None:
        outcome.set_result(REPORT)
    else:
        outcome.set_exception(error)
    return Handle("a", outcome)


def test_outcome_hands_over_a_value_and_an_error() -> None:
    """Whoever waits gets the value, or the error raised."""
    good: Outcome[int] = Outcome()
    bad: Outcome[int] = Outcome()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(good.result), pool.submit(bad.result, PATIENCE_SECONDS)
        good.set_result(3)
        bad.set_exception(KeyError("x"))
        assert waiting[0].result(PATIENCE_SECONDS) == 3
        with pytest.raises(KeyError):
            waiting[1].result(PATIENCE_SECONDS)
    assert good.done()
    assert good.exception() is None


@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_outcome_times_out(timeout: float) -> None:
    """A wait ends with TimeoutError after its time, and leaves nothing behind in the outcome."""
    outcome: Outcome[int] = Outcome()
    with pytest.raises(TimeoutError):
        outcome.result(timeout)
    assert not outcome._callbacks
    outcome.set_result(1)
    assert outcome.result(timeout) == 1
    assert outcome.result(float("inf")) == 1


def test_outcome_is_set_once() -> None:
    """A request ends exactly once (D4)."""
    outcome: Outcome[int] = Outcome()
    outcome.set_result(1)
    with pytest.raises(AssertionError):
        outcome.set_exception(KeyError())


def test_callbacks_are_called_once_whoever_comes_first() -> None:
    """Each callback is called exactly once, though it is added while another thread sets the outcome."""
    for _ in range(200):
        outcome: Outcome[int] = Outcome()
        calls: list[int] = []
        start = threading.Barrier(2)

        def add(outcome: Outcome[int] = outcome, calls: list[int] = calls, start: Any = start) -> None:
            start.wait()
            for number in range(20):
                outcome.add_done_callback(lambda number=number: calls.append(number))  # type: ignore[misc]

        thread = threading.Thread(target=add)
        thread.start()
        start.wait()
        outcome.set_result(1)
        thread.join()
        assert sorted(calls) == list(range(20))


def test_a_broken_callback_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """What a callback raises is logged, and the others are called."""
    outcome: Outcome[int] = Outcome()
    calls: list[str] = []
    outcome.add_done_callback(lambda: 1 / 0)
    outcome.add_done_callback(lambda: calls.append("called"))
    outcome.set_result(1)
    assert calls == ["called"]
    assert "ZeroDivisionError" in caplog.text


def test_outcome_never_waits_for_its_waiter() -> None:
    """Setting it needs no lock that a waiter could hold: a waiter stopped anywhere cannot stop the loop (L1)."""
    assert not [name for name in Outcome.__slots__ if "lock" in name or "condition" in name]


def test_handle_gives_the_same_answer_again() -> None:
    """A handle may be asked again and again."""
    handle = settled()
    assert handle.wait() is handle.wait(0) is REPORT
    failed = settled(KeyError("x"))
    for _ in range(2):
        with pytest.raises(KeyError):
            failed.wait()


def test_a_failure_may_itself_be_a_timeout() -> None:
    """A storage's own TimeoutError is raised as it is, not taken for that of the wait."""
    error = TimeoutError("the storage")
    with pytest.raises(TimeoutError) as raised:
        settled(error).wait(1)
    assert raised.value is error


def test_handle_times_out() -> None:
    """A wait that ends early says how far the save is, and nobody is taken for waiting afterwards (E1)."""
    handle = Handle("a", Outcome())
    with pytest.raises(FlushTimeoutError, match="accepted after 0"):
        handle.wait(0)
    assert not handle.is_waited_for
    assert not handle.done()


def test_handle_tells_who_it_is() -> None:
    """Its representation names place and state."""
    assert repr(Handle("s3://b/a", Outcome())) == "<Handle 's3://b/a' accepted>"
    assert settled().url == "a"


def test_callback_of_a_handle_gets_the_handle() -> None:
    """A callback added late is called at once."""
    handle, got = settled(), []
    handle.add_done_callback(got.append)
    assert got == [handle]


def test_a_failure_is_claimed_by_one_thread() -> None:
    """Of any number of threads one has the telling, and has it still where Ctrl-C came between (E1)."""
    failure = Failure(settled(), KeyError())
    start = threading.Barrier(8)

    def claim() -> tuple[bool, bool]:
        start.wait()
        claims = failure.claim(), failure.claim()
        start.wait()  # else a thread that ends early may leave its number to the next
        return claims

    with ThreadPoolExecutor(8) as pool:
        claims = [future.result() for future in [pool.submit(claim) for _ in range(8)]]
    assert sorted(claims) == [(False, False)] * 7 + [(True, True)]


def test_waiting_on_the_loop_thread_is_refused() -> None:
    """A callback that waits for another handle gets an error instead of a deadlock (B2)."""
    handle = Handle("a", Outcome())
    handle._loop_thread = threading.get_ident()
    with pytest.raises(RuntimeError, match="callback"):
        handle.wait()


def test_another_process_may_not_wait() -> None:
    """In a forked child the parent's handle refuses at once, as nobody there could ever set it (L1)."""
    handle = Handle("a", Outcome())
    handle._pid = os.getpid() + 1
    with pytest.raises(RuntimeError, match="another process"):
        handle.wait()


@pytest.mark.anyio
async def test_handle_is_awaited(anyio_backend: str) -> None:
    """A task may await it under asyncio and trio while another thread sets it."""
    outcome: Outcome[Report] = Outcome()
    handle = Handle("a", outcome)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, outcome.set_result, REPORT)
        assert await handle is REPORT
    assert await handle is REPORT


@pytest.mark.anyio
async def test_a_cancelled_task_leaves_the_request_alone(anyio_backend: str) -> None:
    """Cancelling who waits ends the waiting and nothing else; being set later is no error."""
    outcome: Outcome[Report] = Outcome()
    with anyio.move_on_after(0.001) as scope:
        await Handle("a", outcome)
    assert scope.cancelled_caught
    outcome.set_result(REPORT)
    await await_outcome(outcome)


def test_a_task_whose_loop_was_closed_waits_no_more() -> None:
    """A task that was left in a loop which is closed is not there to be told; in a loop that may go on, it is (E1)."""
    handle = Handle("a", Outcome())
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Task[Report]:
        async def wait() -> Report:
            return await handle

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(begin())
    assert handle.is_waited_for
    loop.close()
    assert not handle.is_waited_for
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is what this test is about


def test_a_waiter_whose_loop_has_ended_is_forgotten() -> None:
    """An outcome that is set after its waiter's event loop has ended harms nobody."""
    outcome: Outcome[Report] = Outcome()

    async def give_up() -> None:
        with anyio.move_on_after(0):
            await await_outcome(outcome)

    anyio.run(give_up)
    anyio.run(give_up, backend="trio")
    outcome.set_result(REPORT)
