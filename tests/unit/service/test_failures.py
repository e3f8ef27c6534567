"""Each failure is told once, and old errors do not stand in the way of new work (E1, E2)."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from async_ckpt import AbandonedError, FlushError, State, StoreError
from async_ckpt.engine.failures import Failures
from async_ckpt.handle import Failure, Handle, Outcome
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, gated, state
from tests.unit.service.calls import failing, loaded


def test_failure_is_told_by_the_handle() -> None:
    """Whoever waits on the handle gets the error with the worker's traceback, and no other call raises it (E1)."""
    with Harness(failing(), memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        with pytest.raises(StoreError, match="no more room") as raised:
            handle.wait(PATIENCE_SECONDS)
        assert "write" in [entry.name for entry in raised.traceback]
        assert handle.state is State.FAILED
        harness.service.wait()
        with pytest.raises(StoreError):  # the handle itself goes on telling
            handle.wait(PATIENCE_SECONDS)


NEXT_CALLS: dict[str, Callable[[Harness], object]] = {
    "save": lambda harness: harness.service.save(state(2), "memory://b"),
    "remove": lambda harness: harness.service.remove("memory://c"),
    "load": lambda harness: harness.service.load("memory://c"),
    "wait": lambda harness: harness.service.wait(),
    "close": lambda harness: harness.service.close(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_failure_is_told_by_the_next_call(call: str) -> None:
    """A failure that nobody waited for is raised by the next call, whichever it is, and by no further one (E1)."""
    with Harness(failing(1), memory=True) as harness:
        done = threading.Event()
        harness.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        with pytest.raises(StoreError, match="no more room"):
            NEXT_CALLS[call](harness)
        if call != "close":
            harness.service.wait()


def test_several_failures_come_as_a_group() -> None:
    """Several failures come as one FlushError, oldest first, that can be split by type (E1)."""
    errors = iter([StoreError("one"), PermissionError("two")])
    gate, hold = gated()
    with Harness(hold, Fault(operation="commit", error=lambda: next(errors)), memory=True) as harness:
        harness.service.save(state(1), "memory://a")
        harness.service.save(state(2), "memory://b")
        gate.open()
        with pytest.raises(FlushError) as raised:
            harness.service.wait()
        assert [str(error) for error in raised.value.exceptions] == ["one", "two"]
        ours, others = raised.value.split(StoreError)
        assert isinstance(ours, FlushError)
        assert isinstance(others, FlushError)
        harness.service.wait()


def test_a_failed_removal_is_told() -> None:
    """A removal that the store could not do is a failure like any other (E1)."""
    with Harness(failing(operation="delete"), memory=True) as harness:
        harness.service.remove("memory://a")
        with pytest.raises(StoreError, match="no more room"):
            harness.service.wait()


def test_failure_goes_to_whoever_waits_on_the_handle() -> None:
    """While a thread waits on the handle, the error is that thread's, and wait() in another does not raise it (E1)."""
    gate, hold = gated("commit")
    with Harness(hold, failing(), memory=True) as harness, ThreadPoolExecutor(1) as pool:
        handle = harness.service.save(state(1), "memory://a")
        waiting = pool.submit(handle.wait, PATIENCE_SECONDS)
        while not handle.is_waited_for:
            pass
        gate.open()
        with pytest.raises(StoreError):
            waiting.result(PATIENCE_SECONDS)
        harness.service.wait()


def test_two_threads_are_told_once() -> None:
    """Of two threads that could be told of a failure, exactly one is (E1)."""
    for _ in range(20):
        with Harness(failing(1), memory=True) as harness, ThreadPoolExecutor(2) as pool:
            harness.service.save(state(1), "memory://a")
            told = [pool.submit(harness.service.wait).exception(PATIENCE_SECONDS) for _ in range(2)]
            assert sorted(type(error).__name__ for error in told) == ["NoneType", "StoreError"]


@pytest.mark.parametrize("operation", ["begin", "put", "commit", "delete"])
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_store_ends_the_loop(kind: type[BaseException], operation: str) -> None:
    """What is no ordinary error fails the request whose store has raised it, and none of the others (D4, E1)."""
    fault = Fault(operation=operation, calls=[1], error=lambda: kind("gone"))  # type: ignore[arg-type]
    with Harness(fault, memory=True) as harness:
        service = harness.service
        request = (
            service.remove("memory://a") if operation == "delete" else service.save(state(1), "memory://a")
        )
        with pytest.raises(AbandonedError, match=f"memory://a.*{kind.__name__}: gone") as raised:
            request.wait(PATIENCE_SECONDS)
        assert isinstance(raised.value.__cause__, kind)
        assert service.save(state(2), "memory://b").wait(PATIENCE_SECONDS).state is State.DURABLE


def test_rest_waits_until_a_failure_is_told() -> None:
    """A service with a failure that nobody was told of does not rest: the exit, should nobody ask, prints it (E1)."""
    with Harness(failing(1), memory=True) as harness:
        done = threading.Event()
        harness.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        harness.service.rest()
        assert harness.service.is_running
        with pytest.raises(StoreError):
            harness.service.wait()
        harness.service.rest()
        assert not harness.service.is_running
        assert harness.service.save(state(2), "memory://b").wait(PATIENCE_SECONDS).state is State.DURABLE


def test_warn_warns_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    """With on_error="warn" a failure is logged with its traceback and warned of, once, and nothing is raised (E1)."""
    with Harness(failing(1), memory=True, on_error="warn") as harness:
        harness.service.save(state(1), "memory://a")
        with pytest.warns(RuntimeWarning, match="memory://a"):
            harness.service.wait()
        harness.service.wait()
        assert harness.service.save(state(2), "memory://b").wait(PATIENCE_SECONDS).state is State.DURABLE
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_old_error_does_not_drop_a_new_save() -> None:
    """The save that raises an earlier failure has been accepted all the same, and becomes durable (E2)."""
    with Harness(failing(1), memory=True) as harness:
        harness.service.save(state(1), "memory://a").add_done_callback(lambda _: None)
        with pytest.raises(StoreError):
            harness.service.wait()
        failed = harness.service.save(state(1), "memory://a")
        assert failed.wait(PATIENCE_SECONDS).state is State.DURABLE
    with Harness(failing(1), memory=True) as harness:
        done = threading.Event()
        harness.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        with pytest.raises(StoreError):
            harness.service.save(state(2), "memory://b")
        assert loaded(harness, "memory://b") == 2


def test_an_error_in_flight_stays_first(caplog: pytest.LogCaptureFixture) -> None:
    """At the end of a with block training's own error is raised; ours is logged and in its notes (E2)."""

    def train() -> None:
        with Harness(failing(), memory=True) as harness:
            harness.service.save(state(1), "memory://a")
            raise ZeroDivisionError("training failed")

    with pytest.raises(ZeroDivisionError) as raised:
        train()
    assert "no more room" in caplog.text
    if sys.version_info >= (3, 11):
        assert "no more room" in raised.value.__notes__[0]


def test_a_save_in_an_error_handler_keeps_ours_for_later() -> None:
    """A last save while training's error is handled does not raise an older failure; the next call does (E2, E1)."""
    with Harness(failing(1), memory=True) as harness:
        done = threading.Event()
        harness.service.save(state(1), "memory://a").add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_SECONDS)
        try:
            raise ZeroDivisionError("training failed")
        except ZeroDivisionError:
            handle = harness.service.save(state(2), "memory://b")
        with pytest.raises(StoreError):
            harness.service.wait()
        assert handle.state is State.DURABLE


def test_an_ambient_error_is_not_in_flight() -> None:
    """A service that lives wholly inside an error handler, as in a retry loop, raises its failures (E1)."""
    try:
        raise ZeroDivisionError("first attempt failed")
    except ZeroDivisionError:
        with pytest.raises(StoreError), Harness(failing(), memory=True) as harness:
            harness.service.save(state(1), "memory://a")


def test_two_services_share_an_ambient_error() -> None:
    """Each of several services made inside one error handler knows that error for caught (E1)."""
    try:
        raise ZeroDivisionError("first attempt failed")
    except ZeroDivisionError:
        rigs = [Harness(failing(), memory=True) for _ in range(2)]
        for harness in rigs:
            with pytest.raises(StoreError), harness:
                harness.service.save(state(1), "memory://a")


def test_an_error_in_place_of_a_dead_one() -> None:
    """An error that lies in memory where one lay that was caught before the service was made is in flight (E2)."""
    failures, past = made_while_handling(ValueError("caught, and forgotten"))
    failures.add(Failure(Handle("memory://a", Outcome()), StoreError("no more room")))
    kept = []
    while id(error := ValueError("training failed")) != past:
        kept.append(error)
        assert len(kept) < 10_000
    try:
        raise error
    except ValueError:
        failures.raise_unless_in_flight(but=Handle("memory://b", Outcome()))
        failures.raise_or_add()
    assert not failures


def made_while_handling(error: Exception) -> tuple[Failures, int]:
    """Return failures of a service that is made while *error* is handled, and where that lay in memory."""
    try:
        raise error
    except ValueError:
        return Failures(warn=False), id(error)


def test_an_ambient_error_keeps_nothing() -> None:
    """The error in whose handler a service was made is not kept alive by it, and can be sent to other processes."""

    class Local:
        """Something in a frame of the error's traceback."""

    def fail() -> weakref.ref[Local]:
        local = Local()
        try:
            raise ValueError("caught")
        except ValueError as error:
            services.append(Failures(warn=False))
            copies.extend([pickle.loads(pickle.dumps(error)), copy.deepcopy(error)])
        return weakref.ref(local)

    services: list[Failures] = []
    copies: list[ValueError] = []
    assert fail()() is None
    assert [each.args for each in copies] == [("caught",)] * 2
