"""The end of a service, and of what is under way then (L1, D4, B2)."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from async_ckpt import AbandonedError, CheckpointService, FlushError, ServiceClosedError, State
from async_ckpt.engine.queue import Kind
from async_ckpt.stores import locate
from tests.support import PATIENCE_SECONDS, Harness, gated, number_at, reached, state, wait_until_one_waits
from tests.unit.service.calls import CLOSED_CALLS


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
    harness = Harness(hold)
    harness.service.save(state(1), path).wait(PATIENCE_SECONDS)
    running = harness.service.save(state(2), path)
    queued = harness.service.save(state(3), tmp_path / "b.ckpt")
    reached(gate)
    with pytest.raises(FlushError) as raised:
        harness.service.close(timeout=0)
    assert [type(error) for error in raised.value.exceptions] == [AbandonedError, AbandonedError]
    assert (running.state, queued.state) == (State.FAILED, State.FAILED)
    assert number_at(path) == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_a_closed_service_says_so(call: str) -> None:
    """save, remove and load of a closed service raise ServiceClosedError; wait has nothing to wait for (L1)."""
    with Harness(memory=True) as harness:
        harness.service.save(state(1), "memory://a")
    with pytest.raises(ServiceClosedError, match="closed"):
        CLOSED_CALLS[call](harness.service)
    harness.service.wait()
    assert harness.service.pending == ()


def test_close_turns_away_who_waits_for_room() -> None:
    """A thread that waits for admission when the service is closed gets ServiceClosedError (D4)."""
    gate, hold = gated()
    harness = Harness(hold, memory=True, queue_depth=1)
    with ThreadPoolExecutor(2) as pool:
        harness.service.save(state(1), "memory://a")
        blocked = pool.submit(harness.service.save, state(2), "memory://b")
        wait_until_one_waits(harness.service)
        closing = pool.submit(harness.service.close)
        with pytest.raises(ServiceClosedError):
            blocked.result(PATIENCE_SECONDS)
        gate.open()
        closing.result(PATIENCE_SECONDS)
        assert harness.memory is not None
        assert list(harness.memory.files) == ["/a"]


def test_close_turns_away_who_waits_to_load() -> None:
    """A load that waits for a save, another service's too, ends as its own service is closed, not later (D4)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as saving, ThreadPoolExecutor(1) as pool:
        saving.service.save(state(1), "memory://a")
        loading = Harness(memory=True)
        loading.service.remove("memory://b").wait(PATIENCE_SECONDS)
        waiting = pool.submit(loading.service.load, "memory://a")
        wait_until_one_waits(loading.service, Kind.LOAD)
        loading.service.close()
        assert isinstance(waiting.exception(PATIENCE_SECONDS / 2), ServiceClosedError)
        gate.open()


def test_a_load_outlives_the_service() -> None:
    """A load that is reading while another thread closes the service has what it came for."""
    harness = Harness(memory=True)
    harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
    with harness.service.turn(locate("memory://a")):
        harness.service.close()


def test_everything_is_freed(tmp_path: Path) -> None:
    """After close no thread of ours is left, and a new service works (B2)."""
    for number in range(3):
        with CheckpointService() as service:
            service.save(state(number), tmp_path / "a.ckpt")
            assert any(thread.name.startswith("async_ckpt") for thread in threading.enumerate())
        assert not any(thread.name.startswith("async_ckpt") for thread in threading.enumerate())
    assert number_at(tmp_path / "a.ckpt") == 2
