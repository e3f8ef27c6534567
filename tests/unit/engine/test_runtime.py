"""The loop thread: who keeps it alive, who may call it, what ends it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from async_ckpt import AbandonedError, ServiceClosedError
from async_ckpt.engine import runtime
from async_ckpt.engine.runtime import Runtime
from async_ckpt.engine.workers import PoolWorkers
from tests.support import PATIENCE_SECONDS


class Holder:
    """Somebody who holds the runtime."""

    def drain_at_exit(self) -> bool:
        return True


@pytest.fixture
def running() -> Iterator[Runtime]:
    """A runtime that one holder keeps."""
    user = runtime.RuntimeUser(Holder())
    held = runtime.acquire(user)
    yield held
    runtime.release(held, user)


def test_one_thread_for_all_holders() -> None:
    """All holders share one loop thread; it ends when the last one lets go, and a new one can begin (B2)."""
    one, two = runtime.RuntimeUser(Holder()), runtime.RuntimeUser(Holder())
    first = runtime.acquire(one)
    assert runtime.acquire(two) is first
    assert runtime.acquire(two) is first
    runtime.release(first, one)
    assert runtime.current() is first
    runtime.release(first, two)
    assert runtime.current() is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("async_ckpt")]
    second = runtime.acquire(one)
    assert second is not first
    runtime.release(first, one)
    assert runtime.current() is second
    runtime.release(second, one)
    runtime.release(second, one)


def test_calls_run_on_the_loop_thread_in_order(running: Runtime) -> None:
    """Posted and called functions run on the one thread, in the order in which they came."""
    seen: list[int] = []
    for number in range(100):
        running.post(seen.append, number)
    assert running.call(threading.get_ident) != threading.get_ident()
    assert seen == list(range(100))


def test_a_call_raises_what_the_function_raised(running: Runtime) -> None:
    """The caller gets the function's own error."""

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        running.call(fail)


def test_a_posted_function_that_fails_is_logged(running: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for a posted function, so its error is logged, and the loop goes on."""
    running.post(lambda: 1 / 0)
    assert running.call(lambda: 3) == 3
    assert "ZeroDivisionError" in caplog.text


def test_the_loop_may_not_call_itself(running: Runtime) -> None:
    """A call from the loop thread would wait for itself, and is refused (B2)."""
    with pytest.raises(RuntimeError, match="observer"):
        running.call(lambda: running.call(lambda: 1))


def test_coroutines_run_on_the_loop(running: Runtime) -> None:
    """A coroutine function runs on the loop, and its result comes back."""

    async def work() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert running.call_async(work).result(PATIENCE_SECONDS) == "async_ckpt-loop"


def test_what_comes_too_late_is_refused() -> None:
    """After the loop has ended, calls raise ServiceClosedError; none waits for ever (B2)."""
    user = runtime.RuntimeUser(Holder())
    ended = runtime.acquire(user)
    runtime.release(ended, user)
    with pytest.raises(ServiceClosedError):
        ended.call(lambda: 1)
    with pytest.raises(ServiceClosedError):
        ended.post(lambda: 1)


def test_calls_while_it_ends_are_answered_or_refused() -> None:
    """Calls that race with the end of the loop either get their answer or ServiceClosedError (B2)."""
    for _ in range(30):
        user = runtime.RuntimeUser(Holder())
        ending = runtime.acquire(user)
        ends: list[str] = []

        def call(ending: Runtime = ending, ends: list[str] = ends) -> None:
            try:
                while True:
                    ending.call(lambda: 1)
            except ServiceClosedError:
                ends.append("refused")

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        runtime.release(ending, user)
        for caller in callers:
            caller.join(PATIENCE_SECONDS)
            assert not caller.is_alive()
        assert ends == ["refused"] * 3


def test_workers_are_bounded_and_contained(running: Runtime) -> None:
    """No more threads than asked for run at a time, and a SystemExit in one ends a save instead of the loop (B2)."""
    workers = PoolWorkers(2)
    lock = threading.Lock()
    now, most = 0, 0
    both = threading.Barrier(2)

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        both.wait(PATIENCE_SECONDS)
        with lock:
            now -= 1

    async def many() -> None:
        await asyncio.gather(*(workers.run(work) for _ in range(6)))

    async def leave() -> None:
        await workers.run(exit, 3)

    running.call_async(many).result(PATIENCE_SECONDS)
    assert most == 2
    with pytest.raises(AbandonedError, match="SystemExit"):
        running.call_async(leave).result(PATIENCE_SECONDS)
    assert workers.close(PATIENCE_SECONDS)


@pytest.mark.parametrize("line", range(12))
def test_one_runtime_whatever_line_a_handler_interrupts(line: int) -> None:
    """A handler that needs the runtime while it is being started shares the one that is started, or starts it (L1)."""
    one, two = runtime.RuntimeUser(Holder()), runtime.RuntimeUser(Holder())
    held: list[Runtime] = []
    remaining = line

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal remaining
        if frame.f_code is not runtime._begin.__code__:
            return None
        if event == "line":
            remaining -= 1
            if remaining < 0 and not held:
                sys.settrace(None)  # as in a handler, which is not interrupted itself
                held.append(runtime.acquire(two))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        first = runtime.acquire(one)
    finally:
        sys.settrace(before)
    held = held or [runtime.acquire(two)]
    try:
        assert held == [first]
        loops = [thread for thread in threading.enumerate() if thread.name == "async_ckpt-loop"]
        assert len(loops) == 1
    finally:
        runtime.release(first, one)
        runtime.release(held[0], two)
