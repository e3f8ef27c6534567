"""What callers of a service see, with stores that fail, stop and go on where the test wants them to."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt import (
    AbandonedError,
    CancelledSaveError,
    CheckpointService,
    FlushError,
    FlushTimeoutError,
    MemoryLimitError,
    OptionError,
    QueueFullError,
    RemovalDroppedError,
    ServiceClosedError,
    State,
    StoreError,
    SupersededError,
    UnknownProtocolError,
    UnpicklableStateError,
    load,
)
from async_ckpt.events import Event, PartWritten
from async_ckpt.stores import locate
from async_ckpt.testing import Fault
from tests.support import (
    PATIENCE_SECONDS,
    Rig,
    gated,
    number_at,
    number_of,
    reached,
    state,
    wait_until_one_waits,
)


def failing(*calls: int, operation: Any = "commit") -> Fault:
    """Return the fault of a store that fails for good."""
    return Fault(operation=operation, calls=calls or None, error=lambda: StoreError("no more room"))


def loaded(rig: Rig, url: str) -> float:
    """Return the number of the checkpoint at *url*."""
    return number_of(rig.service.load(url))


# -- the snapshot


def test_mutation_after_save_is_not_written(tmp_path: Path) -> None:
    """What is written is the state at the moment save returned, whatever happens to it later (S1)."""
    weights = torch.zeros(1000)
    alias = weights.numpy()
    live = {"weights": weights, "steps": [1, 2], "array": np.zeros(3)}
    gate, fault = gated()
    with Rig(fault) as rig:
        handle = rig.service.save(live, tmp_path / "a.ckpt")
        weights.add_(1)
        weights.data = torch.ones(7)
        alias[:] = 5
        live["steps"].append(3)
        live["array"][:] = 4
        del live["weights"]
        gate.open()
        handle.wait(PATIENCE_SECONDS)
    written = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert torch.equal(written["weights"], torch.zeros(1000))
    assert written["steps"] == [1, 2]
    assert not written["array"].any()


def test_report(tmp_path: Path) -> None:
    """A waited-for handle returns what became of the save, and its state says so (D1)."""
    with Rig() as rig:
        handle = rig.service.save(state(1), tmp_path / "a.ckpt")
        report = handle.wait(PATIENCE_SECONDS)
        assert report.state is handle.state is State.DURABLE
        assert report.nbytes == (tmp_path / "a.ckpt").stat().st_size
        assert 0 < report.stall_seconds <= report.seconds
        assert rig.service.remove(tmp_path / "a.ckpt").wait(PATIENCE_SECONDS).state is State.REMOVED
    assert not (tmp_path / "a.ckpt").exists()


# -- E1: each failure is told once


def test_failure_is_told_by_the_handle() -> None:
    """Whoever waits on the handle gets the error with the worker's traceback, and no other call raises it (E1)."""
    with Rig(failing(), memory=True) as rig:
        handle = rig.service.save(state(1), "memory://a")
        with pytest.raises(StoreError, match="no more room") as raised:
            handle.wait(PATIENCE_SECONDS)
        assert "write" in [entry.name for entry in raised.traceback]
        assert handle.state is State.FAILED
        rig.service.wait()
        with pytest.raises(StoreError):  # the handle itself goes on telling
            handle.wait(PATIENCE_SECONDS)


NEXT_CALLS: dict[str, Callable[[Rig], object]] = {
    "save": lambda rig: rig.service.save(state(2), "memory://b"),
    "remove": lambda rig: rig.service.remove("memory://c"),
    "load": lambda rig: rig.service.load("memory://c"),
    "wait": lambda rig: rig.service.wait(),
    "close": lambda rig: rig.service.close(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_failure_is_told_by_the_next_call(call: str) -> None:
    """A failure that nobody waited for is raised by the next call, whichever it is, and by no further one (E1)."""
    with Rig(failing(1), memory=True) as rig:
        done = threading.Event()
        rig.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        with pytest.raises(StoreError, match="no more room"):
            NEXT_CALLS[call](rig)
        if call != "close":
            rig.service.wait()


def test_several_failures_come_as_a_group() -> None:
    """Several failures come as one FlushError, oldest first, that can be split by type (E1)."""
    errors = iter([StoreError("one"), PermissionError("two")])
    gate, hold = gated()
    with Rig(hold, Fault(operation="commit", error=lambda: next(errors)), memory=True) as rig:
        rig.service.save(state(1), "memory://a")
        rig.service.save(state(2), "memory://b")
        gate.open()
        with pytest.raises(FlushError) as raised:
            rig.service.wait()
        assert [str(error) for error in raised.value.exceptions] == ["one", "two"]
        ours, others = raised.value.split(StoreError)
        assert isinstance(ours, FlushError)
        assert isinstance(others, FlushError)
        rig.service.wait()


def test_a_failed_removal_is_told() -> None:
    """A removal that the store could not do is a failure like any other (E1)."""
    with Rig(failing(operation="delete"), memory=True) as rig:
        rig.service.remove("memory://a")
        with pytest.raises(StoreError, match="no more room"):
            rig.service.wait()


def test_failure_goes_to_whoever_waits_on_the_handle() -> None:
    """While a thread waits on the handle, the error is that thread's, and wait() in another does not raise it (E1)."""
    gate, hold = gated("commit")
    with Rig(hold, failing(), memory=True) as rig, ThreadPoolExecutor(1) as pool:
        handle = rig.service.save(state(1), "memory://a")
        waiting = pool.submit(handle.wait, PATIENCE_SECONDS)
        while not handle.is_waited_for:
            pass
        gate.open()
        with pytest.raises(StoreError):
            waiting.result(PATIENCE_SECONDS)
        rig.service.wait()


def test_two_threads_are_told_once() -> None:
    """Of two threads that could be told of a failure, exactly one is (E1)."""
    for _ in range(20):
        with Rig(failing(1), memory=True) as rig, ThreadPoolExecutor(2) as pool:
            rig.service.save(state(1), "memory://a")
            told = [pool.submit(rig.service.wait).exception(PATIENCE_SECONDS) for _ in range(2)]
            assert sorted(type(error).__name__ for error in told) == ["NoneType", "StoreError"]


def test_warn_warns_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    """With on_error="warn" a failure is logged with its traceback and warned of, once, and nothing is raised (E1)."""
    with Rig(failing(1), memory=True, on_error="warn") as rig:
        rig.service.save(state(1), "memory://a")
        with pytest.warns(RuntimeWarning, match="memory://a"):
            rig.service.wait()
        rig.service.wait()
        assert rig.service.save(state(2), "memory://b").wait(PATIENCE_SECONDS).state is State.DURABLE
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# -- E2: old errors and new work


def test_an_old_error_does_not_drop_a_new_save() -> None:
    """The save that raises an earlier failure has been accepted all the same, and becomes durable (E2)."""
    with Rig(failing(1), memory=True) as rig:
        rig.service.save(state(1), "memory://a").add_done_callback(lambda _: None)
        with pytest.raises(StoreError):
            rig.service.wait()
        failed = rig.service.save(state(1), "memory://a")
        assert failed.wait(PATIENCE_SECONDS).state is State.DURABLE
    with Rig(failing(1), memory=True) as rig:
        done = threading.Event()
        rig.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        with pytest.raises(StoreError):
            rig.service.save(state(2), "memory://b")
        assert loaded(rig, "memory://b") == 2


def test_an_error_in_flight_stays_first(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a with block training's own error is raised; ours is logged and in its notes (E2)."""

    def train() -> None:
        with Rig(failing(), memory=True) as rig:
            rig.service.save(state(1), "memory://a")
            raise ZeroDivisionError("training failed")

    with pytest.raises(ZeroDivisionError) as raised:
        train()
    assert "no more room" in caplog.text
    if sys.version_info >= (3, 11):
        assert "no more room" in raised.value.__notes__[0]


def test_a_save_in_an_error_handler_keeps_ours_for_later() -> None:
    """A last save while training's error is handled does not raise an older failure; the next call does (E2, E1)."""
    with Rig(failing(1), memory=True) as rig:
        done = threading.Event()
        rig.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        try:
            raise ZeroDivisionError("training failed")
        except ZeroDivisionError:
            handle = rig.service.save(state(2), "memory://b")
        with pytest.raises(StoreError):
            rig.service.wait()
        assert handle.state is State.DURABLE


def test_an_ambient_error_is_not_in_flight() -> None:
    """A service that lives wholly inside an error handler, as in a retry loop, raises its failures (E1)."""
    try:
        raise ZeroDivisionError("first attempt failed")
    except ZeroDivisionError:
        with pytest.raises(StoreError), Rig(failing(), memory=True) as rig:
            rig.service.save(state(1), "memory://a")


# -- B1: room


def test_overflow_raise() -> None:
    """With overflow="raise" a full queue refuses at once, and takes the next when there is room (B1)."""
    gate, hold = gated()
    with Rig(hold, memory=True, queue_depth=1, overflow="raise") as rig:
        handle = rig.service.save(state(1), "memory://a")
        with pytest.raises(QueueFullError, match="queue_depth"):
            rig.service.save(state(2), "memory://b")
        assert rig.service.pending == (handle,)
        gate.open()
        handle.wait(PATIENCE_SECONDS)
        rig.service.save(state(2), "memory://b")


def test_overflow_block() -> None:
    """With overflow="block" the caller waits until a save has ended, and its state is as it was when it called (B1)."""
    gate, hold = gated(calls=[1])
    with Rig(hold, memory=True, queue_depth=1) as rig, ThreadPoolExecutor(1) as pool:
        rig.service.save(state(1), "memory://a")
        blocked = pool.submit(rig.service.save, state(2), "memory://b")
        wait_until_one_waits(rig.service)
        assert not blocked.done()
        gate.open()
        blocked.result(PATIENCE_SECONDS).wait(PATIENCE_SECONDS)
        assert loaded(rig, "memory://b") == 2


def test_overflow_supersede() -> None:
    """With overflow="supersede" a queued save gives way to a newer one of its location and says so (B1, D4)."""
    gate, hold = gated(calls=[1])
    with Rig(hold, memory=True, queue_depth=2, overflow="supersede") as rig:
        rig.service.save(state(1), "memory://a")
        old = rig.service.save(state(2), "memory://b")
        new = rig.service.save(state(3), "memory://b")
        with pytest.raises(SupersededError, match="memory://b"):
            old.wait(PATIENCE_SECONDS)
        assert old.state is State.SUPERSEDED
        gate.open()
        rig.service.wait()
        assert (new.state, loaded(rig, "memory://b")) == (State.DURABLE, 3)


def test_memory_limit_refuses() -> None:
    """With overflow="raise" a snapshot that does not fit beside those held is refused (B1)."""
    gate, hold = gated()
    with Rig(hold, memory=True, queue_depth=9, overflow="raise", memory_limit="3MiB") as rig:
        rig.service.save(state(1, nbytes=2 << 20), "memory://a")
        with pytest.raises(MemoryLimitError, match="memory_limit"):
            rig.service.save(state(2, nbytes=2 << 20), "memory://b")
        rig.service.save(state(3), "memory://c")
        gate.open()


def test_memory_limit_blocks() -> None:
    """Snapshots never hold more than memory_limit together: a burst waits for memory (B1)."""
    gate, hold = gated(calls=[1])
    with Rig(hold, memory=True, queue_depth=9, memory_limit="3MiB") as rig, ThreadPoolExecutor(1) as pool:
        rig.service.save(state(1, nbytes=2 << 20), "memory://a")
        blocked = pool.submit(rig.service.save, state(2, nbytes=2 << 20), "memory://b")
        wait_until_one_waits(rig.service)
        gate.open()
        blocked.result(PATIENCE_SECONDS)


def test_oversize_save_runs_alone() -> None:
    """A save larger than memory_limit is accepted when nothing else is held (B1)."""
    with Rig(memory=True, queue_depth=9, memory_limit="1MiB") as rig:
        for number in range(3):
            rig.service.save(state(number, nbytes=3 << 20), f"memory://{number}")
        rig.service.wait()
        assert [loaded(rig, f"memory://{number}") for number in range(3)] == [0, 1, 2]


# -- O1, O2, O3, D3


def test_removal_cancels_a_queued_save() -> None:
    """Remove of a queued save's location ends that save at once (O3)."""
    gate, hold = gated(calls=[1])
    with Rig(hold, memory=True) as rig:
        rig.service.save(state(1), "memory://a")
        queued = rig.service.save(state(2), "memory://b")
        removal = rig.service.remove("memory://b")
        with pytest.raises(CancelledSaveError, match="memory://b"):
            queued.wait(PATIENCE_SECONDS)
        gate.open()
        removal.wait(PATIENCE_SECONDS)
        assert rig.memory is not None
        assert list(rig.memory.files) == ["/a"]


def test_failed_replacement_keeps_the_old_checkpoint() -> None:
    """A removal after a save that fails deletes nothing and says so, while the save runs or after (D3)."""
    gate, hold = gated("commit", calls=[2])
    with Rig(hold, failing(2), memory=True) as rig:
        rig.service.save(state(1), "memory://old").wait(PATIENCE_SECONDS)
        new = rig.service.save(state(2), "memory://new")
        removal = rig.service.remove("memory://old")
        gate.open()
        with pytest.raises(StoreError):
            new.wait(PATIENCE_SECONDS)
        with pytest.raises(RemovalDroppedError, match="memory://old"):
            removal.wait(PATIENCE_SECONDS)
        assert removal.state is State.DROPPED
        with pytest.raises(RemovalDroppedError):
            rig.service.remove("memory://old").wait(PATIENCE_SECONDS)
        assert loaded(rig, "memory://old") == 1


def test_load_waits_for_its_own_path_only() -> None:
    """A load returns what the pending save of its path wrote; a stuck save of another path does not matter (O2)."""
    gate, hold = gated(calls=[2])
    with Rig(hold, memory=True, max_concurrent_saves=2) as rig:
        rig.service.save(state(1), "memory://a")
        stuck = rig.service.save(state(2), "memory://b")
        assert loaded(rig, "memory://a") == 1
        assert not stuck.done()
        gate.open()
        assert loaded(rig, "memory://b") == 2


def test_order_holds_across_services(tmp_path: Path) -> None:
    """Saves, loads and removals of one location through different services take effect in program order (O1)."""
    path = tmp_path / "a.ckpt"
    gate, hold = gated()
    with Rig(hold) as one, Rig() as two:
        one.service.save(state(1), path)
        second = two.service.save(state(2), path)
        reached(gate)
        assert not second.done()
        gate.open()
        assert number_of(two.service.load(path)) == 2
        assert one.service.remove(path).wait(PATIENCE_SECONDS).state is State.REMOVED
        third = two.service.save(state(3), path)
        assert number_of(load(path)) == 3
        assert third.done()


def test_one_file_has_one_order_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute, as URL or through a symlink: one file is one location (O1)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    spellings: list[str | Path] = [
        "a.ckpt",
        tmp_path / "a.ckpt",
        f"file://{tmp_path}/a.ckpt",
        "link/./a.ckpt",
    ]
    gate, hold = gated(calls=[1])
    with Rig(hold, queue_depth=9, max_concurrent_saves=9) as rig:
        handles = [rig.service.save(state(number), url) for number, url in enumerate(spellings)]
        reached(gate)
        assert [handle.state for handle in handles[1:]] == [State.STAGED] * 3
        gate.open()
        assert number_of(rig.service.load("a.ckpt")) == 3


# -- waiting


def test_wait_gives_up_in_time() -> None:
    """wait, handle.wait and load raise after their timeout; the save goes on and its outcome is still told (B2)."""
    gate, hold = gated()
    with Rig(hold, memory=True, flush_timeout=0.01) as rig:
        handle = rig.service.save(state(1), "memory://a")
        with pytest.raises(FlushTimeoutError, match="memory://a"):
            rig.service.wait(0)
        with pytest.raises(FlushTimeoutError, match="writing"):
            handle.wait(0.001)
        with pytest.raises(FlushTimeoutError, match="memory://a"):
            rig.service.load("memory://a")
        assert rig.service.pending == (handle,)
        gate.open()
        assert handle.wait(PATIENCE_SECONDS).state is State.DURABLE
        rig.service.wait(PATIENCE_SECONDS)


def test_wait_is_for_what_was_accepted_before() -> None:
    """A save that comes after wait was called does not hold it up (B2)."""
    first, hold_first = gated("commit", calls=[1])
    _, hold_second = gated("commit", calls=[2])
    with Rig(hold_first, hold_second, memory=True) as rig, ThreadPoolExecutor(1) as pool:
        rig.service.save(state(1), "memory://a")
        waiting = pool.submit(rig.service.wait)
        reached(first)
        runtime = rig.service._held()
        assert runtime is not None
        while not runtime.call(lambda: list(runtime.dispatcher._drains)):
            pass
        later = rig.service.save(state(2), "memory://b")
        first.open()
        waiting.result(PATIENCE_SECONDS)
        assert not later.done()


# -- closing


def test_close_drains_and_is_idempotent(tmp_path: Path) -> None:
    """Close sees every accepted save to its end; closing again, or without ever having saved, does nothing (L1)."""
    service = CheckpointService()
    service.save(state(1), tmp_path / "a.ckpt")
    service.close()
    service.close()
    assert number_at(tmp_path / "a.ckpt") == 1
    CheckpointService().close()


def test_close_abandons_at_its_deadline(tmp_path: Path) -> None:
    """What is not done at the deadline fails with AbandonedError; old files stay, no temporary does (D4, D2)."""
    path = tmp_path / "a.ckpt"
    gate, hold = gated("commit", calls=[2])
    rig = Rig(hold)
    rig.service.save(state(1), path).wait(PATIENCE_SECONDS)
    running = rig.service.save(state(2), path)
    queued = rig.service.save(state(3), tmp_path / "b.ckpt")
    reached(gate)
    with pytest.raises(FlushError) as raised:
        rig.service.close(timeout=0)
    assert [type(error) for error in raised.value.exceptions] == [AbandonedError, AbandonedError]
    assert (running.state, queued.state) == (State.FAILED, State.FAILED)
    assert number_at(path) == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


CLOSED_CALLS: dict[str, Callable[[CheckpointService], object]] = {
    "save": lambda service: service.save(state(1), "memory://a"),
    "remove": lambda service: service.remove("memory://a"),
    "load": lambda service: service.load("memory://a"),
}


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_a_closed_service_says_so(call: str) -> None:
    """save, remove and load of a closed service raise ServiceClosedError; wait has nothing to wait for (L1)."""
    with Rig(memory=True) as rig:
        rig.service.save(state(1), "memory://a")
    with pytest.raises(ServiceClosedError, match="closed"):
        CLOSED_CALLS[call](rig.service)
    rig.service.wait()
    assert rig.service.pending == ()


def test_close_turns_away_who_waits_for_room() -> None:
    """A thread that waits for admission when the service is closed gets ServiceClosedError (D4)."""
    gate, hold = gated()
    rig = Rig(hold, memory=True, queue_depth=1)
    with ThreadPoolExecutor(2) as pool:
        rig.service.save(state(1), "memory://a")
        blocked = pool.submit(rig.service.save, state(2), "memory://b")
        wait_until_one_waits(rig.service)
        closing = pool.submit(rig.service.close)
        with pytest.raises(ServiceClosedError):
            blocked.result(PATIENCE_SECONDS)
        gate.open()
        closing.result(PATIENCE_SECONDS)
        assert rig.memory is not None
        assert list(rig.memory.files) == ["/a"]


def test_a_load_outlives_the_service() -> None:
    """A load that is reading while another thread closes the service has what it came for."""
    rig = Rig(memory=True)
    rig.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
    with rig.service.turn(locate("memory://a")):
        rig.service.close()


def test_everything_is_freed(tmp_path: Path) -> None:
    """After close no thread of ours is left, and a new service works (B2)."""
    for number in range(3):
        with CheckpointService() as service:
            service.save(state(number), tmp_path / "a.ckpt")
            assert any(thread.name.startswith("async_ckpt") for thread in threading.enumerate())
        assert not any(thread.name.startswith("async_ckpt") for thread in threading.enumerate())
    assert number_at(tmp_path / "a.ckpt") == 2


# -- interruptions


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
    with Rig(hold, memory=True, queue_depth=1) as rig, interruptible() as interrupt:
        rig.service.save(state(1), "memory://a")

        def watch() -> None:
            wait_until_one_waits(rig.service)
            interrupt()

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            with pytest.raises(KeyboardInterrupt):
                rig.service.save(state(2), "memory://b")
            watching.result(PATIENCE_SECONDS)
        gate.open()
        rig.service.save(state(3), "memory://c")
        rig.service.wait()
        assert rig.memory is not None
        assert sorted(rig.memory.files) == ["/a", "/c"]


def test_interrupt_while_staging_withdraws() -> None:
    """Ctrl-C in a save that has its place: it is abandoned, and place and memory come free (D4, B1)."""
    with interruptible() as interrupt:
        seen: list[str] = []

        def observer(event: Event) -> None:
            seen.append(type(event).__name__)
            if seen == ["Accepted"]:
                interrupt()

        with Rig(memory=True, queue_depth=1, memory_limit="1MiB", observer=observer) as rig:
            with pytest.raises(KeyboardInterrupt):
                rig.service.save(state(1, nbytes=1 << 20), "memory://a")
            rig.service.save(state(2, nbytes=1 << 20), "memory://b").wait(PATIENCE_SECONDS)
            assert seen[:3] == ["Accepted", "Abandoned", "Accepted"]
            assert rig.memory is not None
            assert list(rig.memory.files) == ["/b"]


# -- observers


def test_events_are_in_order() -> None:
    """An observer sees every state of a save once, in order, under one id (D4)."""
    with Rig(memory=True, part_size="64KiB", max_concurrent_parts=1) as rig:
        rig.service.save(state(1, nbytes=200_000), "memory://a").wait(PATIENCE_SECONDS)
        rig.service.remove("memory://a").wait(PATIENCE_SECONDS)
        parts = [event for event in rig.events if isinstance(event, PartWritten)]
        assert rig.names() == [
            "Accepted",
            "Staged",
            "Writing",
            "LaidOut",
            "Begun",
            *["PartWritten"] * len(parts),
            "Committing",
            "Durable",
            "Removed",
        ]
        assert [part.index for part in parts] == [0, 1, 2, 3]
        assert len({event.request_id for event in rig.events}) == 2


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_broken_observer_harms_nothing(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """What an observer raises is logged, and the save becomes durable all the same."""

    def observer(event: Event) -> None:
        raise error("broken")

    with Rig(memory=True, observer=observer) as rig:
        assert rig.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS).state is State.DURABLE
    assert {record.name for record in caplog.records} == {"async_ckpt.dispatch"}
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


CALLS_BACK: dict[str, Callable[[CheckpointService], object]] = {
    **CLOSED_CALLS,
    "wait": lambda service: service.wait(),
    "close": lambda service: service.close(),
    "pending": lambda service: service.pending,
}


@pytest.mark.parametrize("call", CALLS_BACK)
def test_an_observer_that_calls_back_is_told_off(call: str) -> None:
    """An observer that calls its service gets a RuntimeError instead of a deadlock; the service is unharmed (B2)."""
    errors: list[BaseException] = []

    def observer(event: Event) -> None:
        try:
            CALLS_BACK[call](rig.service)
        except RuntimeError as error:
            errors.append(error)

    with Rig(memory=True, observer=observer) as rig:
        rig.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        rig.service.save(state(2), "memory://a").wait(PATIENCE_SECONDS)
        assert loaded(rig, "memory://a") == 2
    assert "observer or a callback" in str(errors[0])
    assert len(errors) == 16


# -- threads


def test_threads_share_a_service(tmp_path: Path) -> None:
    """Threads that use a fresh service at the same time all have their saves written, and none is left behind (B2)."""
    start = threading.Barrier(8)
    with Rig(queue_depth=3) as rig:

        def work(number: int) -> float:
            start.wait(PATIENCE_SECONDS)
            rig.service.save(state(number), tmp_path / f"{number}.ckpt")
            return number_of(rig.service.load(tmp_path / f"{number}.ckpt"))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == list(range(8))


# -- bad input


def nothing_left(directory: Path) -> bool:
    """Tell whether nothing was made in *directory*."""
    return not os.listdir(directory)


def test_unpicklable_state(tmp_path: Path) -> None:
    """An object that pickle refuses is refused by save, which says where it is; the service goes on."""
    with Rig() as rig:
        with pytest.raises(UnpicklableStateError, match=r"state\['callbacks'\]\[1\]") as raised:
            rig.service.save({"callbacks": [1, threading.Lock()]}, tmp_path / "a.ckpt")
        assert raised.value.where == "state['callbacks'][1]"
        assert rig.events == []
        assert nothing_left(tmp_path)
        rig.service.save(state(1), tmp_path / "a.ckpt").wait(PATIENCE_SECONDS)


def test_directory_as_path(tmp_path: Path) -> None:
    """A path that is a directory is refused by save."""
    with Rig() as rig:
        with pytest.raises(StoreError, match="directory"):
            rig.service.save(state(1), tmp_path)
        assert nothing_left(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    """A directory in which this user may not write is refused by save."""
    tmp_path.chmod(0o500)
    try:
        with Rig() as rig, pytest.raises(StoreError, match=r"write|permission"):
            rig.service.save(state(1), tmp_path / "a.ckpt")
    finally:
        tmp_path.chmod(0o700)
    assert nothing_left(tmp_path)


def test_a_place_that_only_the_store_can_refuse() -> None:
    """Where only the attempt can tell that nothing can be written, the handle tells, with location and stage (E1)."""
    with Rig() as rig:
        handle = rig.service.save(state(1), "/proc/async_ckpt-test.ckpt")
        with pytest.raises(StoreError, match=r"/proc/async_ckpt-test\.ckpt") as raised:
            handle.wait(PATIENCE_SECONDS)
        assert raised.value.stage == "begin"


def test_file_as_parent(tmp_path: Path) -> None:
    """A parent that is a file is refused by save."""
    (tmp_path / "file").write_text("")
    with Rig() as rig, pytest.raises(StoreError):
        rig.service.save(state(1), tmp_path / "file" / "a.ckpt")


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_unknown_protocol(call: str) -> None:
    """A protocol that no file system answers to is refused at the call."""
    with Rig() as rig, pytest.raises(UnknownProtocolError, match="nonsense://"):
        getattr(rig.service, call)(*([state(1)] if call == "save" else []), "nonsense://a/b")


@pytest.mark.parametrize("place", [None, 3, b"a.ckpt", "", "  ", "a\0b"])
def test_wrong_places(place: Any) -> None:
    """What is no path is refused at the call, with TypeError or OptionError."""
    with Rig() as rig, pytest.raises((TypeError, OptionError)):
        rig.service.save(state(1), place)
