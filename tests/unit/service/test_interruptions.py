"""Ctrl-C where a save waits (D4, B1); at every line, see tests/integration/test_signals.py."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

import pytest

from async_ckpt.events import Event
from tests.support import PATIENCE_SECONDS, Harness, gated, state, wait_until_one_waits


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Give a function for other threads that interrupts this one as Ctrl-C does, and returns when it has."""
    interrupted = threading.Event()
    here = threading.get_ident()

    def handler(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def interrupt() -> None:
        signal.pthread_kill(here, signal.SIGINT)
        assert interrupted.wait(PATIENCE_SECONDS)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_waiting_for_room_withdraws() -> None:
    """Ctrl-C in a save that waits for a place: nothing was accepted, and the place goes to the next (D4, B1)."""
    gate, hold = gated(calls=[1])
    with Harness(hold, memory=True, queue_depth=1) as harness, interruptible() as interrupt:
        harness.service.save(state(1), "memory://a")

        def watch() -> None:
            wait_until_one_waits(harness.service)
            interrupt()

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            with pytest.raises(KeyboardInterrupt):
                harness.service.save(state(2), "memory://b")
            watching.result(PATIENCE_SECONDS)
        gate.open()
        harness.service.save(state(3), "memory://c")
        harness.service.wait()
        assert harness.memory is not None
        assert sorted(harness.memory.files) == ["/a", "/c"]


def test_interrupt_while_staging_withdraws() -> None:
    """Ctrl-C in a save that has its place: it is abandoned, and place and memory come free (D4, B1)."""
    with interruptible() as interrupt:
        seen: list[str] = []

        def observer(event: Event) -> None:
            seen.append(type(event).__name__)
            if seen == ["Accepted"]:
                interrupt()

        with Harness(memory=True, queue_depth=1, memory_limit="1MiB", observer=observer) as harness:
            with pytest.raises(KeyboardInterrupt):
                harness.service.save(state(1, nbytes=1 << 20), "memory://a")
            harness.service.save(state(2, nbytes=1 << 20), "memory://b").wait(PATIENCE_SECONDS)
            assert seen[:3] == ["Accepted", "Abandoned", "Accepted"]
            assert harness.memory is not None
            assert list(harness.memory.files) == ["/b"]
