"""What a save writes, what its handle reports, who waits for it, and from how many threads (S1, D1, B2)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from async_ckpt import FlushTimeoutError, State
from tests.support import PATIENCE_SECONDS, Harness, accepted, gated, number_of, reached, state


def test_mutation_after_save_is_not_written(tmp_path: Path) -> None:
    """What is written is the state at the moment save returned, whatever happens to it later (S1)."""
    weights = torch.zeros(1000)
    alias = weights.numpy()
    live = {"weights": weights, "steps": [1, 2], "array": np.zeros(3)}
    gate, fault = gated()
    with Harness(fault) as harness:
        handle = harness.service.save(live, tmp_path / "a.ckpt")
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
    with Harness() as harness:
        handle = harness.service.save(state(1), tmp_path / "a.ckpt")
        report = handle.wait(PATIENCE_SECONDS)
        assert report.state is handle.state is State.DURABLE
        assert report.nbytes == (tmp_path / "a.ckpt").stat().st_size
        assert 0 < report.stall_seconds <= report.seconds
        assert harness.service.remove(tmp_path / "a.ckpt").wait(PATIENCE_SECONDS).state is State.REMOVED
    assert not (tmp_path / "a.ckpt").exists()


def test_wait_gives_up_in_time() -> None:
    """wait, handle.wait and load raise after their timeout; the save goes on and its outcome is still told (B2)."""
    gate, hold = gated()
    with Harness(hold, memory=True, flush_timeout=0.01) as harness:
        handle = accepted(harness.service, state(1), "memory://a")
        reached(gate)
        with pytest.raises(FlushTimeoutError, match="memory://a"):
            harness.service.wait(0)
        with pytest.raises(FlushTimeoutError, match="writing"):
            handle.wait(0.001)
        with pytest.raises(FlushTimeoutError, match="memory://a"):
            harness.service.load("memory://a")
        assert harness.service.pending == (handle,)
        gate.open()
        assert handle.wait(PATIENCE_SECONDS).state is State.DURABLE
        harness.service.wait(PATIENCE_SECONDS)


def test_wait_is_for_what_was_accepted_before() -> None:
    """A save that comes after wait was called does not hold it up (B2)."""
    first, hold_first = gated("commit", calls=[1])
    _, hold_second = gated("commit", calls=[2])
    with Harness(hold_first, hold_second, memory=True) as harness, ThreadPoolExecutor(1) as pool:
        harness.service.save(state(1), "memory://a")
        waiting = pool.submit(harness.service.wait)
        reached(first)
        runtime = harness.service._resources.held()
        assert runtime is not None
        while not runtime.call(lambda: list(runtime.dispatcher.registry._drains)):
            pass
        later = harness.service.save(state(2), "memory://b")
        first.open()
        waiting.result(PATIENCE_SECONDS)
        assert not later.done()


def test_threads_share_a_service(tmp_path: Path) -> None:
    """Threads that use a fresh service at the same time all have their saves written, and none is left behind (B2)."""
    start = threading.Barrier(8)
    with Harness(queue_depth=3) as harness:

        def work(number: int) -> float:
            start.wait(PATIENCE_SECONDS)
            harness.service.save(state(number), tmp_path / f"{number}.ckpt")
            return number_of(harness.service.load(tmp_path / f"{number}.ckpt"))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == list(range(8))
