"""Which threads are lowered, and when they rise."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from async_ckpt.system import priority
from async_ckpt.system.priority import NICE, background, bulk_work, waiting
from tests.held_disk import USUAL, may_rise, nice_of
from tests.support import PATIENCE_SECONDS, python

pytestmark = pytest.mark.skipif(not may_rise(), reason="this user's threads may not rise again")

LONG = 8 << 20


def here() -> int:
    """Return how nice this thread is."""
    return nice_of(threading.get_native_id())


def test_bulk_work_of_the_background_is_lowered_and_nothing_else() -> None:
    """What is long and in the background is lowered; before it, after it and without it, nothing is."""
    with background():
        with bulk_work(LONG):
            assert here() == NICE
        assert here() == USUAL
        with bulk_work(4096):
            assert here() == USUAL
    with bulk_work(LONG):
        assert here() == USUAL


def test_it_rises_again_where_the_work_fails() -> None:
    """A failure leaves no thread lowered."""
    with pytest.raises(ZeroDivisionError), background(), bulk_work(LONG):
        _ = 1 / 0
    assert here() == USUAL


def test_nothing_is_lowered_while_somebody_waits() -> None:
    """Work that begins while somebody waits is at normal priority, until the last of them has gone."""
    with background():
        with waiting():
            with waiting():
                pass
            with bulk_work(LONG):
                assert here() == USUAL
        with bulk_work(LONG):
            assert here() == NICE


def test_what_is_lowered_rises_at_the_first_who_waits() -> None:
    """Whoever begins to wait raises, before anything else, what is lowered on other threads."""
    began, goes_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=work_until, args=(began, goes_on))
    thread.start()
    assert began.wait(PATIENCE_SECONDS)
    assert thread.native_id is not None
    assert nice_of(thread.native_id) == NICE
    with waiting():
        assert nice_of(thread.native_id) == USUAL
    goes_on.set()
    thread.join()


def work_until(began: threading.Event, goes_on: threading.Event) -> None:
    """Do bulk work."""
    with background(), bulk_work(LONG):
        began.set()
        goes_on.wait(PATIENCE_SECONDS)


def test_what_is_late_rises_and_stays() -> None:
    """What is told to hurry rises at once, and is not lowered any more."""
    with background() as work:
        with bulk_work(LONG):
            work.hurry()
            assert here() == USUAL
        with bulk_work(LONG):
            assert here() == USUAL


def test_a_thread_that_is_nicer_already_stays_so() -> None:
    """A thread with a nice value of the program's own keeps that, whether it is higher or lower than ours."""
    seen: list[int] = []

    def work() -> None:
        for value in (USUAL + 1, NICE + 5):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), value)
            with background(), bulk_work(LONG):
                seen.append(here())
            seen.append(here())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [NICE, USUAL + 1, NICE + 5, NICE + 5]


def test_a_forked_child_waits_for_nobody() -> None:
    """Who waits in the parent does not wait in a child that is forked meanwhile."""
    done = python("""
import os, threading
from async_ckpt.system import priority
from async_ckpt.system.priority import NICE, background, bulk_work, waiting

with waiting():
    if (child := os.fork()) == 0:
        with background(), bulk_work(8 << 20):
            os._exit(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.stdout.strip() == str(NICE), done.stderr


def test_an_interrupted_wait_is_forgotten() -> None:
    """Ctrl-C at any line of a wait leaves nobody who waits for ever."""
    for line in itertools.count(1):
        was_interrupted = waits_until_interrupted_at(line)
        with background(), bulk_work(LONG):
            assert here() == NICE, f"interrupted at line {line}"
        if not was_interrupted:
            break
    assert line > 5


def waits_until_interrupted_at(number: int) -> bool:
    """Wait for a moment; return whether that was interrupted at its line of that number."""
    lines = itertools.count(1)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != priority.__file__:
            return None
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with waiting():
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
