"""Signal handlers and Ctrl-C at every line of a save: the walk takes one line after the other."""

from __future__ import annotations

import concurrent.futures._base
import gc
import linecache
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import CheckpointService, FlushError, ServiceClosedError, StoreError
from async_ckpt.engine.queue import Kind
from async_ckpt.events import Event
from async_ckpt.handle import Handle
from async_ckpt.snapshot import HostBuffer
from async_ckpt.snapshot.parallel_copy import copy_together
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, gated, number_of, one_waits, state, wait_until_one_waits

PACKAGE = Path(async_ckpt.__file__).parent
#: Where a caller spends its time, apart from the snapshot.
OURS = {
    str(PACKAGE / f"{name}.py")
    for name in (
        "service",
        "handle",
        "engine/submission",
        "engine/resources",
        "engine/runtime",
        "engine/failures",
    )
}
PACKAGE_FILES = {
    str(file) for room in (".", "engine", "system", "telemetry") for file in (PACKAGE / room).glob("*.py")
}
#: Where it would hold locks, were it waiting in the standard library's way.
WALKED = OURS | {str(module.__file__) for module in (concurrent.futures._base, threading)}


FAILING_CALLS: dict[str, Callable[[CheckpointService, list[Handle]], object]] = {
    "save": lambda service, handles: service.save(state(2), "memory://b"),
    "remove": lambda service, handles: service.remove("memory://b"),
    "load": lambda service, handles: service.load("memory://0"),
    "load while it fails": lambda service, handles: service.load("memory://0"),
    "wait": lambda service, handles: service.wait(PATIENCE_SECONDS),
    "settle": lambda service, handles: service.settle(PATIENCE_SECONDS),
    "handle": lambda service, handles: handles[0].wait(PATIENCE_SECONDS),
    "close": lambda service, handles: service.close(PATIENCE_SECONDS),
}


@contextmanager
def hearing(told: list[BaseException]) -> Iterator[None]:
    """Note the failures that are told, one by one; an interruption tells of none."""
    try:
        yield
    except KeyboardInterrupt:
        pass
    except StoreError as error:
        told.append(error)
    except FlushError as error:
        told.extend(error.exceptions)


@contextmanager
def at_line(number: int, act: Callable[[], object], files: Collection[str] = WALKED) -> Iterator[list[str]]:
    """Call *act* before the *number*-th line that this thread runs in the walked files; yield where that was."""
    where: list[str] = []
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        # Python delivers no signal between the end of a with block and its __exit__, where tracing stops as well.
        if event == "line" and not linecache.getline(
            frame.f_code.co_filename, frame.f_lineno
        ).lstrip().startswith("with "):
            lines += 1
            if lines == number:
                where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)


@contextmanager
def handling(signum: signal.Signals, act: Callable[[], object]) -> Iterator[None]:
    """Have *act* called when the signal comes."""
    before = signal.signal(signum, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signum, before)


def use(service: CheckpointService, url: str, number: float) -> None:
    """Save, wait and load, each with a bound."""
    service.save(state(number), url).wait(PATIENCE_SECONDS)
    service.wait(PATIENCE_SECONDS)
    assert number_of(service.load(url)) == number


def walk(step: Callable[[int], list[str]]) -> int:
    """Call *step* with 1, 2, … until there is no such line; return how many there were."""
    number = 1
    # No collection in the midst of a step: what is raised in a finalizer, Python swallows, and nobody was interrupted.
    gc.disable()
    try:
        while step(number):
            number += 1
            if number % 50 == 0:
                gc.collect()
    finally:
        gc.enable()
    return number - 1


def test_a_handler_may_use_the_service_at_every_line_of_save() -> None:
    """Whichever line of save a signal interrupts, the handler can save, wait and load, the same path or another.

    Then the interrupted save becomes durable as well (L1).
    """

    def step(line: int) -> list[str]:
        with Harness(memory=True, queue_depth=1, memory_limit=8192) as harness:
            use(harness.service, "memory://a", 1)
            path = "memory://a" if line % 2 else "memory://b"
            handled: list[int] = []

            def handler() -> None:
                use(harness.service, path, 3)
                handled.append(line)

            with (
                handling(signal.SIGUSR1, handler),
                at_line(line, lambda: signal.raise_signal(signal.SIGUSR1)) as where,
            ):
                handle = harness.service.save(state(2), "memory://a")
            handle.wait(PATIENCE_SECONDS)
            assert len(handled) == len(where)
            assert number_of(harness.service.load("memory://a")) in (2, 3)
            return where

    assert walk(step) > 40


def test_a_handler_may_use_the_service_while_its_thread_waits_for_room() -> None:
    """A handler that interrupts a save which waits for a place gets its own save through, past the bounds (L1)."""
    gate, hold = gated(calls=[1])
    here = threading.get_ident()
    with Harness(hold, memory=True, queue_depth=1) as harness:
        handled = threading.Event()

        def handler() -> None:
            nested = harness.service.save(state(3), "memory://c")
            assert not nested.done()
            gate.open()
            nested.wait(PATIENCE_SECONDS)
            assert number_of(harness.service.load("memory://c")) == 3
            handled.set()

        def watch() -> None:
            wait_until_one_waits(harness.service)
            signal.pthread_kill(here, signal.SIGUSR1)

        with handling(signal.SIGUSR1, handler):
            harness.service.save(state(1), "memory://a")
            watcher = threading.Thread(target=watch)
            watcher.start()
            harness.service.save(state(2), "memory://b")
            watcher.join()
        assert handled.is_set()
        use(harness.service, "memory://b", 2)


def test_a_handler_may_use_the_service_while_its_thread_takes_the_snapshot() -> None:
    """A handler that interrupts a save which holds the only place gets its own save through, past the bounds (L1)."""
    here = threading.get_ident()
    handled = threading.Event()
    seen: list[str] = []

    def observer(event: Event) -> None:
        seen.append(type(event).__name__)
        if seen == ["Accepted"]:
            signal.pthread_kill(here, signal.SIGUSR1)

    def handler() -> None:
        use(harness.service, "memory://a", 3)
        handled.set()

    with Harness(memory=True, queue_depth=1, memory_limit=8192, observer=observer) as harness:
        with handling(signal.SIGUSR1, handler):
            harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
            assert handled.wait(PATIENCE_SECONDS)
        assert number_of(harness.service.load("memory://a")) in (1, 3)


@pytest.mark.parametrize("alone", [True, False])
def test_a_handler_may_close_the_service_at_every_line_of_save(alone: bool) -> None:
    """A handler may close the service it interrupted: the save is durable, or raises ServiceClosedError (L1, D4).

    So it is where another service keeps the loop running.
    """
    ends: set[str] = set()
    other = Harness(memory=True)
    if not alone:
        use(other.service, "memory://b", 0)

    def step(line: int) -> list[str]:
        harness = Harness(memory=True)
        use(harness.service, "memory://a", 1)
        with (
            handling(signal.SIGTERM, lambda: harness.service.close(PATIENCE_SECONDS)),
            at_line(line, lambda: signal.raise_signal(signal.SIGTERM)) as where,
        ):
            try:
                handle = harness.service.save(state(2), "memory://a")
            except ServiceClosedError:
                ends.add("refused")
            else:
                handle.wait(PATIENCE_SECONDS)
                ends.add("durable")
        harness.service.close()
        return where

    with other:
        assert walk(step) > 40
    assert ends == {"refused", "durable"}


def test_ctrl_c_at_every_line_of_save_leaves_a_working_service() -> None:
    """Whichever line of save Ctrl-C interrupts, its place and memory come free, and the next one works (D4, B1)."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        with Harness(memory=True, queue_depth=1, memory_limit=8192) as harness:
            use(harness.service, "memory://a", 1)
            where: list[str] = []
            try:
                with at_line(line, interrupt) as where:
                    harness.service.save(state(2), "memory://a")
            except KeyboardInterrupt:
                pass
            use(harness.service, "memory://b", 3)
            assert number_of(harness.service.load("memory://a")) in (1, 2)
            assert harness.service.pending == ()
            return where

    assert walk(step) > 40


def test_ctrl_c_at_every_line_of_a_first_save_leaves_no_thread() -> None:
    """Nor does it leave the loop thread that the first save starts, once the service is closed (B2, L1)."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        harness = Harness(memory=True)
        where: list[str] = []
        try:
            with at_line(line, interrupt, PACKAGE_FILES) as where:
                harness.service.save(state(1), "memory://a")
        except KeyboardInterrupt:
            pass
        harness.service.close()
        for thread in threading.enumerate():
            if thread.name.startswith("async_ckpt"):
                until = time.monotonic() + PATIENCE_SECONDS
                while thread.ident is None:  # it is only about to start
                    assert time.monotonic() < until, where
                thread.join(PATIENCE_SECONDS)
                assert not thread.is_alive(), where
        return where

    assert walk(step) > 100


@pytest.mark.parametrize("call", ["load", "wait", "remove"])
def test_ctrl_c_at_every_line_of_other_calls_leaves_a_working_service(call: str) -> None:
    """The same for load, wait and remove: no location stays held and nothing waits for what is gone (D4)."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        with Harness(memory=True, queue_depth=1) as harness:
            use(harness.service, "memory://a", 1)
            where: list[str] = []
            try:
                with at_line(line, interrupt) as where:
                    getattr(harness.service, call)(*([] if call == "wait" else ["memory://a"]))
            except KeyboardInterrupt:
                pass
            use(harness.service, "memory://a", 3)
            return where

    assert walk(step) > 10


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("call", FAILING_CALLS)
def test_ctrl_c_at_every_line_of_telling_loses_no_failure(call: str, count: int) -> None:
    """Whichever line Ctrl-C interrupts, who is not told of a failure for that is told by the next call (E1)."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        told: list[BaseException] = []
        gate, hold = gated("commit")
        failing = Fault(operation="commit", error=lambda: StoreError("no more room"))
        with Harness(hold, failing, memory=True, max_concurrent_saves=2) as harness:
            handles = [harness.service.save(state(1), f"memory://{number}") for number in range(count)]
            over = threading.Event()

            def let_fail() -> None:
                while call.endswith("while it fails") and not one_waits(harness.service, Kind.LOAD):
                    if over.is_set():  # Ctrl-C came first
                        break
                gate.open()
                for handle in handles:
                    handle._outcome.exception(PATIENCE_SECONDS)

            where: list[str] = []
            with ThreadPoolExecutor(1) as pool, hearing(told):
                failing_now = pool.submit(let_fail)
                if not call.endswith("while it fails"):
                    failing_now.result(PATIENCE_SECONDS)
                try:
                    with at_line(line, interrupt, OURS) as where:
                        FAILING_CALLS[call](harness.service, handles)
                finally:
                    over.set()
            with hearing(told):
                harness.service.wait(PATIENCE_SECONDS)
            assert {id(error) for error in told} >= {id(handle._outcome.exception()) for handle in handles}, (
                where
            )
            harness.service.wait(PATIENCE_SECONDS)
        return where

    assert walk(step) > 10


@pytest.mark.parametrize("nested", [True, False])
def test_rest_may_be_interrupted_at_every_line(nested: bool) -> None:
    """Whichever line of rest a handler or Ctrl-C interrupts, the service can be used there and after it (L1)."""
    handled: list[int] = []

    def step(line: int) -> list[str]:
        harness = Harness(memory=True)
        use(harness.service, "memory://a", 1)

        def act() -> None:
            if not nested:
                raise KeyboardInterrupt
            use(harness.service, "memory://b", 2)
            handled.append(line)

        where: list[str] = []
        try:
            with at_line(line, act, PACKAGE_FILES) as where:
                harness.service.rest()
        except KeyboardInterrupt:
            pass
        use(harness.service, "memory://c", 3)
        harness.service.close()
        assert not harness.service.is_running
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("async_ckpt")], where
        return where

    lines = walk(step)
    assert lines > 50
    assert handled == [*range(1, lines + 1)] * nested


def test_ctrl_c_at_every_line_of_close_leaves_no_thread() -> None:
    """Whichever line of close Ctrl-C interrupts, closing again ends it, and no thread is left (B2, L1)."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        harness = Harness(memory=True)
        harness.service.save(state(1), "memory://a")
        where: list[str] = []
        try:
            with at_line(line, interrupt, OURS) as where:
                harness.service.close()
        except KeyboardInterrupt:
            harness.service.close()
        for thread in threading.enumerate():
            if thread.name.startswith(("async_ckpt", "ThreadPoolExecutor")):
                thread.join(PATIENCE_SECONDS)
                assert not thread.is_alive(), where
        return where

    assert walk(step) > 30


def test_no_thread_writes_to_memory_that_may_be_reused() -> None:
    """Wherever Ctrl-C strikes a copy by several threads, none of them lives on in a buffer that is free (S1, L1)."""
    sources = [torch.ones(24 << 20, dtype=torch.uint8) for _ in range(2)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(number: int) -> list[str]:
        buffer = HostBuffer(48 << 20)
        where: list[str] = []
        try:
            with at_line(number, interrupt, {str(PACKAGE / "snapshot" / "parallel_copy.py")}) as where:
                copy_together(buffer.as_tensor().split(24 << 20), sources)
        except KeyboardInterrupt:
            pass
        alive = [thread for thread in threading.enumerate() if thread.name == "async_ckpt-copy"]
        assert not alive or buffer.is_aliased, where
        for thread in alive:
            thread.join()
        return where

    assert walk(step) > 20
