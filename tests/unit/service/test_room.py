"""Places, memory, and what becomes of a save for which there is no room (B1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from async_ckpt import MemoryLimitError, QueueFullError, State, StateChangedError, SupersededError
from tests.support import PATIENCE_SECONDS, Harness, gated, state, wait_until_one_waits
from tests.unit.service.calls import loaded


def test_overflow_raise() -> None:
    """With overflow="raise" a full queue refuses at once, and takes the next when there is room (B1)."""
    gate, hold = gated()
    with Harness(hold, memory=True, queue_depth=1, overflow="raise") as harness:
        handle = harness.service.save(state(1), "memory://a")
        with pytest.raises(QueueFullError, match="queue_depth"):
            harness.service.save(state(2), "memory://b")
        assert harness.service.pending == (handle,)
        gate.open()
        handle.wait(PATIENCE_SECONDS)
        harness.service.save(state(2), "memory://b")


def test_overflow_block() -> None:
    """With overflow="block" the caller waits until a save has ended, and its state is as it was when it called (B1)."""
    gate, hold = gated(calls=[1])
    with Harness(hold, memory=True, queue_depth=1) as harness, ThreadPoolExecutor(1) as pool:
        harness.service.save(state(1), "memory://a")
        blocked = pool.submit(harness.service.save, state(2), "memory://b")
        wait_until_one_waits(harness.service)
        assert not blocked.done()
        gate.open()
        blocked.result(PATIENCE_SECONDS).wait(PATIENCE_SECONDS)
        assert loaded(harness, "memory://b") == 2


def test_memory_freed_while_a_save_waits_for_room() -> None:
    """A save whose tensors another thread frees while it waits for room is refused, and nothing was accepted (B1)."""
    gate, hold = gated(calls=[1])
    with Harness(hold, memory=True, queue_depth=1) as harness, ThreadPoolExecutor(1) as pool:
        harness.service.save(state(1), "memory://a")
        freed = {"large": torch.ones(5 << 20), "small": torch.ones(9)}
        blocked = pool.submit(harness.service.save, freed, "memory://b")
        wait_until_one_waits(harness.service)
        for tensor in freed.values():
            tensor.untyped_storage().resize_(0)
        gate.open()
        with pytest.raises(StateChangedError, match="nothing was saved"):
            blocked.result(PATIENCE_SECONDS)
        harness.service.wait()
        assert harness.service.pending == ()
        harness.service.save(state(3), "memory://b").wait(PATIENCE_SECONDS)
        assert loaded(harness, "memory://b") == 3
    assert harness.memory is not None
    assert [kind for kind, _ in harness.memory.log] == ["save", "save"]


def test_overflow_supersede() -> None:
    """With overflow="supersede" a queued save gives way to a newer one of its location and says so (B1, D4)."""
    gate, hold = gated(calls=[1])
    with Harness(hold, memory=True, queue_depth=2, overflow="supersede") as harness:
        harness.service.save(state(1), "memory://a")
        old = harness.service.save(state(2), "memory://b")
        new = harness.service.save(state(3), "memory://b")
        with pytest.raises(SupersededError, match="memory://b"):
            old.wait(PATIENCE_SECONDS)
        assert old.state is State.SUPERSEDED
        gate.open()
        harness.service.wait()
        assert (new.state, loaded(harness, "memory://b")) == (State.DURABLE, 3)


def test_memory_limit_refuses() -> None:
    """With overflow="raise" a snapshot that does not fit beside those held is refused (B1)."""
    gate, hold = gated()
    with Harness(hold, memory=True, queue_depth=9, overflow="raise", memory_limit="3MiB") as harness:
        harness.service.save(state(1, nbytes=2 << 20), "memory://a")
        with pytest.raises(MemoryLimitError, match="memory_limit"):
            harness.service.save(state(2, nbytes=2 << 20), "memory://b")
        harness.service.save(state(3), "memory://c")
        gate.open()


def test_memory_limit_blocks() -> None:
    """Snapshots never hold more than memory_limit together: a burst waits for memory (B1)."""
    gate, hold = gated(calls=[1])
    with (
        Harness(hold, memory=True, queue_depth=9, memory_limit="3MiB") as harness,
        ThreadPoolExecutor(1) as pool,
    ):
        harness.service.save(state(1, nbytes=2 << 20), "memory://a")
        blocked = pool.submit(harness.service.save, state(2, nbytes=2 << 20), "memory://b")
        wait_until_one_waits(harness.service)
        gate.open()
        blocked.result(PATIENCE_SECONDS)


def test_oversize_save_runs_alone() -> None:
    """A save larger than memory_limit is accepted when nothing else is held (B1)."""
    with Harness(memory=True, queue_depth=9, memory_limit="1MiB") as harness:
        for number in range(3):
            harness.service.save(state(number, nbytes=3 << 20), f"memory://{number}")
        harness.service.wait()
        assert [loaded(harness, f"memory://{number}") for number in range(3)] == [0, 1, 2]
