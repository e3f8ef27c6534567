"""What a signal handler may ask of the service whose ``save`` it interrupted (L1); all else is in test_signals.py."""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from async_ckpt import FlushTimeoutError, Handle, RemovalDroppedError, ServiceClosedError
from async_ckpt.events import Accepted, Event
from tests.support import Harness, number_of, state


class Interrupted:
    """A harness in which the first save of ``memory://new`` is interrupted once it has its place, by *handler*."""

    def __init__(self, handler: Callable[[Harness], object]) -> None:
        self.harness = Harness(memory=True, observer=self._observe)
        self.order: list[tuple[str, str]] = []
        self.answers: list[Any] = []
        self._handler = handler
        self._main = threading.get_ident()
        self._is_due = True

    def _observe(self, event: Event) -> None:
        self.order.append((type(event).__name__, event.url))
        if self._is_due and isinstance(event, Accepted) and event.url == "memory://new":
            self._is_due = False
            signal.pthread_kill(
                self._main, signal.SIGUSR1
            )  # its thread waits to be admitted: nothing is staged

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.answers.append(self._handler(self.harness))

    def save(self) -> Handle:
        """Save ``memory://old``, and then, with the interruption, ``memory://new``."""
        self.harness.service.save(state(1), "memory://old").wait()
        before = signal.signal(signal.SIGUSR1, self._handle)
        try:
            return self.harness.service.save(state(2), "memory://new")
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_a_removal_waits_for_the_interrupted_save() -> None:
    """What a handler removes is there until the save that it interrupted is durable (D3)."""
    interrupted = Interrupted(lambda harness: harness.service.remove("memory://old"))
    with interrupted.harness as harness:
        interrupted.save()
        harness.service.wait()
        order = interrupted.order
        assert order.index(("Durable", "memory://new")) < order.index(("Removed", "memory://old"))


def test_a_removal_is_dropped_where_the_interrupted_save_is_given_up() -> None:
    """Where the handler raises, the save is not accepted, and the removal that counted on it is dropped (D3)."""

    def handler(harness: Harness) -> None:
        removals.append(harness.service.remove("memory://old"))
        raise KeyboardInterrupt  # no OSError: asyncio would swallow that as it wakes the loop

    removals: list[Handle] = []
    interrupted = Interrupted(handler)
    with interrupted.harness as harness:
        with pytest.raises(KeyboardInterrupt):
            interrupted.save()
        with pytest.raises(RemovalDroppedError):
            removals[0].wait()
        assert number_of(harness.service.load("memory://old")) == 1


def test_what_is_removed_does_not_wait_for_itself() -> None:
    """A handler may remove what its thread is about to save: the save then writes it anew."""

    def handler(harness: Harness) -> None:
        harness.service.remove("memory://new").wait()

    interrupted = Interrupted(handler)
    with interrupted.harness as harness:
        interrupted.save().wait()
        assert harness.memory is not None
        assert sorted(harness.memory.files) == ["/new", "/old"]


def test_waiting_for_a_removal_is_refused_at_once() -> None:
    """A handler that waits for what comes after the call it interrupted would wait for ever: it is told so."""

    def handler(harness: Harness) -> str:
        with pytest.raises(RuntimeError, match="would never end") as raised:
            harness.service.remove("memory://old").wait()
        return str(raised.value)

    interrupted = Interrupted(handler)
    with interrupted.harness as harness:
        interrupted.save()
        harness.service.wait()
        assert "'memory://old'" in interrupted.answers[0]


def test_wait_waits_for_all_else_and_names_what_is_left() -> None:
    """``wait`` in a handler sees what can end to its end, and does not claim more than that (D1)."""

    def handler(harness: Harness) -> Handle:
        harness.service.remove("memory://old")
        handle = harness.service.save(state(3), "memory://preempted")
        with pytest.raises(FlushTimeoutError, match="'memory://old'") as raised:
            harness.service.wait()
        assert "preempted" not in str(raised.value)
        assert handle.done()
        return handle

    interrupted = Interrupted(handler)
    with interrupted.harness as harness:
        interrupted.save()
        harness.service.wait()
        assert len(interrupted.answers) == 1


def test_what_another_thread_saved_behind_the_interrupted_save() -> None:
    """A handler can neither wait for nor load what another thread has saved where its own thread is saving."""

    def handler(harness: Harness) -> None:
        behind: list[Handle] = []
        thread = threading.Thread(
            target=lambda: behind.append(harness.service.save(state(3), "memory://new"))
        )
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="would never end"):
            behind[0].wait()
        with pytest.raises(RuntimeError, match="would never end"):
            harness.service.load("memory://new")
        with pytest.raises(FlushTimeoutError, match="memory://new"):
            harness.service.wait()

    interrupted = Interrupted(handler)
    with interrupted.harness as harness:
        interrupted.save()
        harness.service.wait()
        assert interrupted.answers == [None]
        assert number_of(harness.service.load("memory://new")) == 3


class Asking:
    """Something to save; the handler runs as pickle asks it what it is, before the save is sent to the queue."""

    def __init__(self, handler: Callable[[], object]) -> None:
        self._handler = handler

    def __reduce__(self) -> tuple[Any, ...]:
        self._handler()
        return OrderedDict, ()


def saved_while_asking(harness: Harness, handler: Callable[[], object]) -> Handle:
    """Save ``memory://old``, and then ``memory://new``, with *handler* as its state is looked at."""
    harness.service.save(state(1), "memory://old").wait()
    return harness.service.save({**state(2), "asked": Asking(handler)}, "memory://new")


def test_a_removal_waits_for_the_save_whose_state_is_looked_at() -> None:
    """What a handler removes before the interrupted save has its place is kept until that is durable, too (D3)."""
    order: list[tuple[str, str]] = []
    with Harness(
        memory=True, observer=lambda event: order.append((type(event).__name__, event.url))
    ) as harness:

        def handler() -> None:
            removal = harness.service.remove("memory://old")
            with pytest.raises(RuntimeError, match="would never end"):
                removal.wait()

        saved_while_asking(harness, handler)
        harness.service.wait()
        assert order.index(("Durable", "memory://new")) < order.index(("Removed", "memory://old"))
        assert number_of(harness.service.load("memory://new")) == 2


def test_a_removal_is_dropped_where_the_state_is_not_saved() -> None:
    """Where the interrupted save comes to nothing, what was to be removed stays; later ones do not (D3)."""
    removals: list[Handle] = []
    with Harness(memory=True) as harness:

        def handler() -> None:
            removals.append(harness.service.remove("memory://old"))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            saved_while_asking(harness, handler)
        with pytest.raises(RemovalDroppedError):
            removals[0].wait()
        assert number_of(harness.service.load("memory://old")) == 1
        harness.service.save(state(3), "memory://new").wait()
        harness.service.remove("memory://old").wait()


def test_a_handler_that_removes_and_closes_leaves_the_earlier_checkpoint() -> None:
    """The interrupted save is turned away, so the removal that counted on it is dropped (D3)."""
    with Harness(memory=True) as harness:

        def handler() -> None:
            removal = harness.service.remove("memory://old")
            harness.service.close()
            with pytest.raises(RemovalDroppedError):
                removal.wait()

        with pytest.raises(ServiceClosedError):
            saved_while_asking(harness, handler)
        assert harness.memory is not None
        assert sorted(harness.memory.files) == ["/old"]


def test_another_thread_closes_while_the_state_is_looked_at() -> None:
    """Whoever closes waits for no save that has not got its place; its caller is told."""
    with Harness(memory=True) as harness:

        def handler() -> None:
            harness.service.remove("memory://old")
            thread = threading.Thread(target=harness.service.close)
            thread.start()
            thread.join()

        with pytest.raises(ServiceClosedError):
            saved_while_asking(harness, handler)


def test_a_handler_that_fills_the_queue_holds_nobody_up() -> None:
    """What waits behind the removal takes places; the interrupted save gets in past them (L1)."""
    with Harness(memory=True, queue_depth=1) as harness:

        def handler() -> None:
            harness.service.remove("memory://old")
            harness.service.save(state(3), "memory://old")
            harness.service.save(state(4), "memory://old")

        saved_while_asking(harness, handler).wait()
        harness.service.wait()
        assert number_of(harness.service.load("memory://old")) == 4
        assert number_of(harness.service.load("memory://new")) == 2
