"""Many removals at a time: how many are carried out together, and what becomes of the others."""

from __future__ import annotations

import pytest

from async_ckpt import AbandonedError, FlushError, State, StoreError
from async_ckpt.engine.execution import MOST_REMOVALS
from async_ckpt.testing import Fault, Gate
from tests.support import PATIENCE_SECONDS, Harness, gated, state

MANY = 3 * MOST_REMOVALS


def deleted(harness: Harness) -> int:
    """Return how many removals have come to the store, once no more of them are on their way there."""
    runtime = harness.service._resources.running()
    before = -1
    while before != (now := harness.store.calls["delete"]) or not now:
        before = now
        for _ in range(10):  # a task that is about to run does so before the loop takes the next call
            runtime.call(int)
    return now


def test_so_many_run_at_a_time() -> None:
    """However many removals may run, so many of a service are at the store at a time, and all take place (B2)."""
    gate, hold = gated("delete")
    with Harness(hold, memory=True) as harness:
        handles = [harness.service.remove(f"memory://{index}") for index in range(MANY)]
        assert deleted(harness) == MOST_REMOVALS
        gate.open()
        assert {handle.wait(PATIENCE_SECONDS).state for handle in handles} == {State.REMOVED}


def test_a_removal_holds_up_no_other_service() -> None:
    """Removals that a store holds up hold up those of their own service alone."""
    _, hold = gated("delete")
    with Harness(hold, memory=True) as held, Harness(memory=True) as other:
        for index in range(MANY):
            held.service.remove(f"memory://{index}")
        assert other.service.remove("memory://a").wait(PATIENCE_SECONDS).state is State.REMOVED


def test_saves_do_not_wait_for_them() -> None:
    """A save of the same service is written while removals hang."""
    _, hold = gated("delete")
    with Harness(hold, memory=True) as harness:
        for index in range(MANY):
            harness.service.remove(f"memory://{index}")
        assert harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS).state is State.DURABLE


@pytest.mark.parametrize("grace", [PATIENCE_SECONDS, 0.0], ids=["stops", "does not answer"])
def test_what_has_not_begun_is_never_carried_out(grace: float) -> None:
    """Closing at a deadline ends those that run and those that do not yet, each once; these delete nothing (D4)."""
    gate, hold = gated("delete")
    harness = Harness(hold, memory=True, abandon_grace_seconds=grace)
    handles = [harness.service.remove(f"memory://{index}") for index in range(MANY)]
    assert deleted(harness) == MOST_REMOVALS
    with pytest.raises(FlushError) as raised:
        harness.service.close(timeout=0)
    gate.open()
    assert [type(error) for error in raised.value.exceptions] == [AbandonedError] * MANY
    assert {handle.state for handle in handles} == {State.FAILED}
    assert harness.store.calls["delete"] == MOST_REMOVALS


def test_one_that_fails_ends_no_other() -> None:
    """Those that come after a removal that fails take place all the same."""
    gate = Gate()  # opened when all have been asked for: a call would raise what has failed before it
    fault = Fault(operation="delete", calls=(1, 2, 20), gate=gate, error=lambda: StoreError("no"))
    with Harness(fault, memory=True) as harness:
        handles = [harness.service.remove(f"memory://{index}") for index in range(MANY)]
        gate.open()
        with pytest.raises(FlushError):
            harness.service.wait(PATIENCE_SECONDS)
        states = [handle.state for handle in handles]
        assert (states.count(State.FAILED), states.count(State.REMOVED)) == (3, MANY - 3)
