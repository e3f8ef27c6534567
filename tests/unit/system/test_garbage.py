"""The collector is held back, and set free again as the program had it."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from async_ckpt.system.garbage import collector_held_back


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore the collector's settings."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.enable()


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """The generations that were collected."""
    found: list[int] = []

    def note(phase: str, told: dict[str, Any]) -> None:
        if phase == "stop":
            found.append(told["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def many() -> list[list[int]]:
    """Make so many objects that the collector would run."""
    return [[] for _ in range(200_000)]


def test_it_does_not_run(passes: list[int]) -> None:
    """No pass within, and one soon after."""
    with collector_held_back():
        made = many()
        assert passes == []
    more = many()
    assert passes
    del made, more


def test_the_programs_settings_stand_again() -> None:
    """Also where an error ends it."""
    gc.set_threshold(123, 7, 8)
    with pytest.raises(KeyError), collector_held_back():
        raise KeyError
    assert gc.get_threshold()[:2] == (123, 7)


def test_what_the_program_switches_off_meanwhile_stays_off() -> None:
    """``gc.disable`` is the program's own."""
    with collector_held_back():
        gc.disable()
    assert not gc.isenabled()


def test_ctrl_c_at_any_point() -> None:
    """An interruption never leaves a program without its collector."""
    before = gc.get_threshold()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(1_500):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 60))
                    for _ in range(20):
                        with collector_held_back():
                            pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert gc.get_threshold() == before
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 100


def test_settings_that_were_left_behind_are_set_back_by_the_next() -> None:
    """As Ctrl-C may do, where it comes in the last step of a ``with``."""
    before = gc.get_threshold()
    left = collector_held_back()
    left.__enter__()
    with collector_held_back():
        pass
    assert gc.get_threshold() == before
    left.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_forked_child_has_the_programs_settings() -> None:
    """Whatever a thread of the parent was doing."""
    with collector_held_back():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.get_threshold()[0] < 1_000_000 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_two_that_overlap() -> None:
    """As threads may: the settings are the program's after the first, and stay so."""
    before = gc.get_threshold()
    one, other = collector_held_back(), collector_held_back()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold() == before
    other.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_program_without_a_collector() -> None:
    """It does not get one."""
    gc.disable()
    with collector_held_back():
        assert not gc.isenabled()
    assert not gc.isenabled()
