"""What a signal handler may ask of the service whose ``save`` it interrupted (L1); all else is in test_signals.py."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from async_ckpt import FlushTimeoutError, Handle, RemovalDroppedError
from async_ckpt.events import Accepted, Event
from tests.support import Rig, number_of, state


class Interrupted:
    """A rig in which the first save of ``memory://new`` is interrupted once it has its place, by *handler*."""

    def __init__(self, handler: Callable[[Rig], object]) -> None:
        self.rig = Rig(memory=True, observer=self._observe)
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
        self.answers.append(self._handler(self.rig))

    def save(self) -> Handle:
        """Save ``memory://old``, and then, with the interruption, ``memory://new``."""
        self.rig.service.save(state(1), "memory://old").wait()
        before = signal.signal(signal.SIGUSR1, self._handle)
        try:
            return self.rig.service.save(state(2), "memory://new")
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_a_removal_waits_for_the_interrupted_save() -> None:
    """What a handler removes is there until the save that it interrupted is durable (D3)."""
    interrupted = Interrupted(lambda rig: rig.service.remove("memory://old"))
    with interrupted.rig as rig:
        interrupted.save()
        rig.service.wait()
        order = interrupted.order
        assert order.index(("Durable", "memory://new")) < order.index(("Removed", "memory://old"))


def test_a_removal_is_dropped_where_the_interrupted_save_is_given_up() -> None:
    """Where the handler raises, the save is not accepted, and the removal that counted on it is dropped (D3)."""

    def handler(rig: Rig) -> None:
        removals.append(rig.service.remove("memory://old"))
        raise InterruptedError

    removals: list[Handle] = []
    interrupted = Interrupted(handler)
    with interrupted.rig as rig:
        with pytest.raises(InterruptedError):
            interrupted.save()
        with pytest.raises(RemovalDroppedError):
            removals[0].wait()
        assert number_of(rig.service.load("memory://old")) == 1


def test_what_is_removed_does_not_wait_for_itself() -> None:
    """A handler may remove what its thread is about to save: the save then writes it anew."""

    def handler(rig: Rig) -> None:
        rig.service.remove("memory://new").wait()

    interrupted = Interrupted(handler)
    with interrupted.rig as rig:
        interrupted.save().wait()
        assert rig.memory is not None
        assert sorted(rig.memory.files) == ["/new", "/old"]


def test_waiting_for_a_removal_is_refused_at_once() -> None:
    """A handler that waits for what comes after the call it interrupted would wait for ever: it is told so."""

    def handler(rig: Rig) -> str:
        with pytest.raises(RuntimeError, match="last for ever") as raised:
            rig.service.remove("memory://old").wait()
        return str(raised.value)

    interrupted = Interrupted(handler)
    with interrupted.rig as rig:
        interrupted.save()
        rig.service.wait()
        assert "'memory://old'" in interrupted.answers[0]


def test_wait_waits_for_all_else_and_names_what_is_left() -> None:
    """``wait`` in a handler sees what can end to its end, and does not claim more than that (D1)."""

    def handler(rig: Rig) -> Handle:
        rig.service.remove("memory://old")
        handle = rig.service.save(state(3), "memory://preempted")
        with pytest.raises(FlushTimeoutError, match="'memory://old'") as raised:
            rig.service.wait()
        assert "preempted" not in str(raised.value)
        assert handle.done()
        return handle

    interrupted = Interrupted(handler)
    with interrupted.rig as rig:
        interrupted.save()
        rig.service.wait()
        assert len(interrupted.answers) == 1


def test_what_another_thread_saved_behind_the_interrupted_save() -> None:
    """A handler can neither wait for nor load what another thread has saved where its own thread is saving."""

    def handler(rig: Rig) -> None:
        behind: list[Handle] = []
        thread = threading.Thread(target=lambda: behind.append(rig.service.save(state(3), "memory://new")))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="last for ever"):
            behind[0].wait()
        with pytest.raises(RuntimeError, match="last for ever"):
            rig.service.load("memory://new")
        with pytest.raises(FlushTimeoutError, match="memory://new"):
            rig.service.wait()

    interrupted = Interrupted(handler)
    with interrupted.rig as rig:
        interrupted.save()
        rig.service.wait()
        assert interrupted.answers == [None]
        assert number_of(rig.service.load("memory://new")) == 3
