"""Services that the program drops without closing them: what they have accepted, hold, and have to tell."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from async_ckpt import AsyncCheckpointIO, CheckpointService, StoreError
from async_ckpt.engine import runtime
from async_ckpt.events import Event
from async_ckpt.handle import Handle, State
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, gated, number_at, reached, state


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Let the collector run only where a test asks it to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def threads_end() -> None:
    """Wait until no thread of ours is left."""
    for thread in threading.enumerate():
        if thread.name.startswith("async_ckpt"):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), thread


def dropped(make: Callable[[], object], match: str = "unclosed .*CheckpointService object at 0x") -> None:
    """Check that what *make* returns is told of once when it is dropped."""

    def drop() -> None:
        make()
        gc.collect()

    with pytest.warns(ResourceWarning, match=match) as told:
        drop()
    assert len(told) == 1


class Owner:
    """Holds a service and is its observer: a cycle through what the service keeps.

    Attributes:
        seen: the names of the events.
    """

    def __init__(self, *faults: Fault) -> None:
        self.seen: list[str] = []
        self.harness = Harness(*faults, memory=True, observer=self.observe)

    def observe(self, event: Event) -> None:
        self.seen.append(type(event).__name__)


def test_what_it_has_accepted_becomes_durable(tmp_path: Path) -> None:
    """A pending save of a service that is dropped becomes durable, as its handle says; no thread is left (D4, B2)."""
    gate, hold = gated("commit")
    handles: list[Handle] = []

    def use() -> None:
        service = Harness(hold, queue_depth=3).service
        for number in range(3):
            handles.append(service.save(state(number), tmp_path / f"{number}.ckpt"))
        reached(gate)

    dropped(use)
    assert not handles[0].done()
    gate.open()
    assert [handle.wait(PATIENCE_SECONDS).state for handle in handles] == [State.DURABLE] * 3
    assert [number_at(tmp_path / f"{number}.ckpt") for number in range(3)] == [0, 1, 2]
    threads_end()


def test_nothing_of_it_is_kept() -> None:
    """When a dropped service has ended, its stores and its memory are gone."""
    kept: list[weakref.ref[object]] = []

    def use() -> None:
        harness = Harness(memory=True)
        harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        kept.extend(weakref.ref(each) for each in (harness.store, harness.service._resources.account.pool))

    dropped(use)
    threads_end()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_a_cycle_through_the_observer() -> None:
    """A service that only its own observer refers to is dropped like any other, once it has nothing under way."""
    gate, hold = gated()

    def use() -> weakref.ref[Owner]:
        owner = Owner(hold)
        handles.append(owner.harness.service.save(state(1), "memory://a"))
        reached(gate)
        return weakref.ref(owner)

    handles: list[Handle] = []
    owner = use()
    gc.collect()
    assert owner() is not None, "its events are still to come"
    gate.open()
    handles[0].wait(PATIENCE_SECONDS)

    def collect() -> None:
        while owner() is not None:  # the loop thread may still be in the midst of the end
            gc.collect()

    dropped(collect)
    threads_end()


@pytest.mark.parametrize("held", [True, False])
def test_its_failure_is_told_once(held: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails once a service has been dropped is told by its handle, or else when the interpreter exits (E1)."""
    gate, hold = gated("commit")
    fails = Fault(operation="commit", error=lambda: StoreError("no more room"))
    handles: list[Handle] = []

    def use() -> None:
        handles.append(Harness(hold, fails, memory=True).service.save(state(1), "memory://a"))
        reached(gate)

    dropped(use)
    gate.open()
    threads_end()
    (unreported,) = runtime._unreported
    if held:
        with pytest.raises(StoreError):
            handles[0].wait(PATIENCE_SECONDS)
    assert bool(unreported) is not held
    assert unreported.print_at_exit() is not held
    assert ("no more room" in capsys.readouterr().err) is not held


def test_what_has_been_told_is_forgotten() -> None:
    """Dropped services whose failures have been told leave nothing behind."""
    fails = Fault(operation="commit", error=lambda: StoreError("no more room"))
    for _ in range(3):
        dropped(lambda: Harness(fails, memory=True).service.save(state(1), "memory://a").wait)
        threads_end()
    assert len(runtime._unreported) <= 3
    for unreported in runtime._unreported:
        unreported.print_at_exit()
    runtime.report_at_exit(runtime._unreported[0])
    assert runtime._unreported == []


def test_dropped_on_the_loop_thread() -> None:
    """The last reference may go on the loop thread itself, in the midst of its work."""

    def use() -> None:
        services = [Harness(memory=True).service]
        services[0].save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        loop = services[0]._resources.running()

        def drop() -> None:
            services.clear()
            gc.collect()

        loop.call(drop)

    dropped(use)
    threads_end()


def test_dropped_where_a_lock_is_held() -> None:
    """Dropping waits for no lock, and the loop for none that a caller holds who may wait for it (L1)."""
    with runtime._lock:
        dropped(lambda: Harness(memory=True).service.save(state(1), "memory://a").wait(PATIENCE_SECONDS))
        with Harness(memory=True) as other:
            other.service.save(state(1), "memory://b").wait(PATIENCE_SECONDS)
    threads_end()


def test_others_go_on() -> None:
    """The loop thread stays for the services that are not dropped."""
    with Harness(memory=True) as other:
        other.service.save(state(1), "memory://b").wait(PATIENCE_SECONDS)
        dropped(lambda: Harness(memory=True).service.save(state(1), "memory://a").wait(PATIENCE_SECONDS))
        other.service.save(state(2), "memory://b").wait(PATIENCE_SECONDS)
    threads_end()


def test_a_filter_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the warning is an error, it is no error of whoever lets go, and the service ends all the same."""
    raised: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        Harness(memory=True).service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        gc.collect()
    assert [type(error) for error in raised] == [ResourceWarning]
    raised.clear()  # it refers to the service
    threads_end()


def test_a_plugin(tmp_path: Path) -> None:
    """A plugin that is dropped is told of by its name, at once, and its saves become durable."""
    seen: list[Event] = []
    AsyncCheckpointIO().teardown()  # imports Lightning, which keeps a traceback of that

    def use() -> None:
        AsyncCheckpointIO(observer=seen.append).save_checkpoint(state(1), str(tmp_path / "a.ckpt"))

    with pytest.warns(ResourceWarning, match="unclosed AsyncCheckpointIO: call its teardown"):
        use()  # nothing is left to the collector
    threads_end()
    assert number_at(tmp_path / "a.ckpt") == 1
    assert [type(event).__name__ for event in seen][-1] == "Durable"


@pytest.mark.parametrize(
    "use",
    [
        lambda service: None,
        lambda service: service.close(),
        lambda service: (service.save(state(1), "memory://a"), service.close()),
        lambda service: (service.save(state(1), "memory://a"), service.wait(), service.rest()),
    ],
)
def test_who_holds_nothing_is_not_told_of(use: Callable[[CheckpointService], object]) -> None:
    """A service that was closed, is at rest or was never used may be dropped."""
    use(Harness(memory=True).service)
    gc.collect()
    threads_end()


def test_one_that_could_not_be_made() -> None:
    """Options that cannot work leave nothing to be dropped."""
    with pytest.raises(ValueError, match="queue_depth"):
        CheckpointService(queue_depth=0)
    gc.collect()
