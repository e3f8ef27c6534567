"""Threads are started where they are needed, and nowhere else."""

from __future__ import annotations

import _thread
import threading
from typing import Any

import pytest

from async_ckpt.system import threads
from tests.support import Harness, state


def test_nothing_is_started_where_there_is_nothing_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, not even the one that would start them."""
    monkeypatch.delattr(_thread, "start_new_thread")
    threads.start()


def test_a_small_save_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a service runs, a state that one thread copies in no time is copied by the caller's alone."""
    started: list[int] = []
    real = _thread.start_new_thread

    def start(*args: Any) -> int:
        started.append(threading.get_ident())
        return real(*args)

    with Harness(memory=True) as harness:
        harness.service.save(state(1), "memory://a").wait()
        monkeypatch.setattr(_thread, "start_new_thread", start)
        monkeypatch.setattr(threading, "_start_new_thread", start)
        harness.service.save(state(2), "memory://a")
        harness.service.wait()
    assert threading.get_ident() not in started
