"""What takes effect when, in one service and in several (O1, O2, O3, D3)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from async_ckpt import CancelledSaveError, RemovalDroppedError, State, StoreError, load
from async_ckpt.stores import locate
from tests.support import PATIENCE_SECONDS, Harness, gated, number_of, reached, state
from tests.unit.service.calls import failing, loaded


def test_removal_cancels_a_queued_save() -> None:
    """Remove of a queued save's location ends that save at once (O3)."""
    gate, hold = gated(calls=[1])
    with Harness(hold, memory=True) as harness:
        harness.service.save(state(1), "memory://a")
        queued = harness.service.save(state(2), "memory://b")
        removal = harness.service.remove("memory://b")
        with pytest.raises(CancelledSaveError, match="memory://b"):
            queued.wait(PATIENCE_SECONDS)
        gate.open()
        removal.wait(PATIENCE_SECONDS)
        assert harness.memory is not None
        assert list(harness.memory.files) == ["/a"]


def test_failed_replacement_keeps_the_old_checkpoint() -> None:
    """A removal after a save that fails deletes nothing and says so, while the save runs or after (D3)."""
    gate, hold = gated("commit", calls=[2])
    with Harness(hold, failing(2), memory=True) as harness:
        harness.service.save(state(1), "memory://old").wait(PATIENCE_SECONDS)
        new = harness.service.save(state(2), "memory://new")
        removal = harness.service.remove("memory://old")
        gate.open()
        with pytest.raises(StoreError):
            new.wait(PATIENCE_SECONDS)
        with pytest.raises(RemovalDroppedError, match="memory://old"):
            removal.wait(PATIENCE_SECONDS)
        assert removal.state is State.DROPPED
        with pytest.raises(RemovalDroppedError):
            harness.service.remove("memory://old").wait(PATIENCE_SECONDS)
        assert loaded(harness, "memory://old") == 1


def test_load_waits_for_its_own_path_only() -> None:
    """A load returns what the pending save of its path wrote; a stuck save of another path does not matter (O2)."""
    gate, hold = gated(calls=[2])
    with Harness(hold, memory=True, max_concurrent_saves=2) as harness:
        harness.service.save(state(1), "memory://a")
        stuck = harness.service.save(state(2), "memory://b")
        assert loaded(harness, "memory://a") == 1
        assert not stuck.done()
        gate.open()
        assert loaded(harness, "memory://b") == 2


def test_loads_of_one_location_do_not_wait_for_each_other() -> None:
    """Two threads read one checkpoint at the same time, and a save of it waits for both (O1)."""
    with Harness(memory=True) as harness, ThreadPoolExecutor(2) as pool:
        harness.service.save(state(1), "memory://a").wait(PATIENCE_SECONDS)
        both, done = Barrier(3), Barrier(3)

        def read() -> None:
            with harness.service.turn(locate("memory://a")):
                both.wait(PATIENCE_SECONDS)
                done.wait(PATIENCE_SECONDS)

        reading = [pool.submit(read) for _ in range(2)]
        both.wait(PATIENCE_SECONDS)
        newer = harness.service.save(state(2), "memory://a")
        assert newer.state is State.STAGED
        done.wait(PATIENCE_SECONDS)
        for thread in reading:
            thread.result(PATIENCE_SECONDS)
        newer.wait(PATIENCE_SECONDS)


def test_order_holds_across_services(tmp_path: Path) -> None:
    """Saves, loads and removals of one location through different services take effect in program order (O1)."""
    path = tmp_path / "a.ckpt"
    gate, hold = gated()
    with Harness(hold) as one, Harness() as two:
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
    with Harness(hold, queue_depth=9, max_concurrent_saves=9) as harness:
        handles = [harness.service.save(state(number), url) for number, url in enumerate(spellings)]
        reached(gate)
        assert [handle.state for handle in handles[1:]] == [State.STAGED] * 3
        gate.open()
        assert number_of(harness.service.load("a.ckpt")) == 3
