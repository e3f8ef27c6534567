"""The doubles do what tests rely on."""

from __future__ import annotations

import errno
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from async_ckpt import CheckpointService, testing
from async_ckpt.errors import StoreError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Part
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import BytesContent, Fault, FaultyStore, Gate, ManualClock, ThreadWorkers, slowed

DATA = b"x" * 100
WHOLE = Part(index=0, start=0, stop=100)
SLOWED_SECONDS = 0.2


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    """Threads for the stores of one test."""
    pool = ThreadWorkers(2)
    yield pool
    pool.close()


def test_the_former_name_of_the_harness_still_works() -> None:
    """``StoreRig`` is ``StoreHarness``."""
    assert testing.StoreRig is testing.StoreHarness


async def save(store: FaultyStore, path: Path) -> None:
    """Save as a writer does: abort after any error."""
    upload = await store.begin(locate(path), len(DATA))
    try:
        await upload.commit([await upload.put(WHOLE, BytesContent(DATA))])
    except BaseException:
        await upload.abort()
        raise


@pytest.mark.parametrize("operation", ["begin", "put", "commit"])
def test_faults_strike_the_named_calls(tmp_path: Path, workers: ThreadWorkers, operation: str) -> None:
    """The second call fails and the others do not."""
    fault = Fault(operation=operation, calls=[2], error=TimeoutError)  # type: ignore[arg-type]
    store = FaultyStore(LocalStore(workers=workers), [fault])
    anyio.run(save, store, tmp_path / "1")
    with pytest.raises(TimeoutError):
        anyio.run(save, store, tmp_path / "2")
    anyio.run(save, store, tmp_path / "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    assert store.calls[operation] == 3


def test_a_fault_after_the_deed(tmp_path: Path, workers: ThreadWorkers) -> None:
    """With ``after`` the deed is done and only its answer lost."""
    fault = Fault(operation="commit", error=lambda: OSError(errno.ETIMEDOUT, "x"), after=True)
    store = FaultyStore(LocalStore(workers=workers), [fault])
    with pytest.raises(OSError, match="x"):
        anyio.run(save, store, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_delays_and_other_operations(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Delays go to the given sleep; deleting, asking and opening can fail too; ``add`` adds."""
    clock = ManualClock()
    store = FaultyStore(
        LocalStore(workers=workers), [Fault(operation="put", delay_seconds=0.3)], sleep=clock.sleep
    )
    anyio.run(save, store, tmp_path / "x")
    assert clock.naps == [0.3]
    location = locate(tmp_path / "x")
    store.add(Fault(operation="delete", error=PermissionError))
    store.add(Fault(operation="exists", error=PermissionError))
    store.add(Fault(operation="source", error=PermissionError))
    with pytest.raises(PermissionError):
        anyio.run(store.delete, location)
    with pytest.raises(PermissionError):
        anyio.run(store.exists, location)
    with pytest.raises(PermissionError):
        anyio.run(store.source, location)


def test_a_gate_holds_until_it_is_opened(tmp_path: Path, workers: ThreadWorkers) -> None:
    """A call waits at its gate until another thread opens it, and passes an open one."""
    gate = Gate()
    store = FaultyStore(LocalStore(workers=workers), [Fault(operation="commit", gate=gate)])
    seen: list[bool] = []

    def watch() -> None:
        gate.reached.wait(60)
        seen.append((tmp_path / "x").exists())
        gate.open()

    watcher = threading.Thread(target=watch)
    watcher.start()
    anyio.run(save, store, tmp_path / "x")
    watcher.join()
    assert seen == [False]
    anyio.run(save, store, tmp_path / "y")
    assert (tmp_path / "y").exists()


def test_cancelled_workers_finish_first(workers: ThreadWorkers) -> None:
    """A cancellation reaches the caller only after the function has returned."""
    order: list[str] = []
    started, finish = threading.Event(), threading.Event()

    def function() -> None:
        started.set()
        finish.wait(60)
        order.append("function")

    async def main() -> None:
        async with anyio.create_task_group() as group:

            async def call() -> None:
                try:
                    await workers.run(function)
                    await anyio.lowlevel.checkpoint()
                finally:
                    order.append("caller")

            group.start_soon(call)
            await workers.run(started.wait, 60)
            group.cancel_scope.cancel()
            finish.set()

    anyio.run(main)
    assert order == ["function", "caller"]


def test_the_error_of_the_store_passes_through(tmp_path: Path, workers: ThreadWorkers) -> None:
    """Errors of the real store are not touched."""
    store = FaultyStore(LocalStore(workers=workers))
    with pytest.raises(StoreError):
        anyio.run(save, store, tmp_path)


def test_slowed_saves_take_longer(tmp_path: Path) -> None:
    """A save, also by a factory that went through pickle, takes the seconds that were asked for, and is whole."""
    with CheckpointService(store_factory=pickle.loads(pickle.dumps(slowed(SLOWED_SECONDS)))) as service:
        assert service.save({"x": 1}, tmp_path / "x.ckpt").wait().seconds >= SLOWED_SECONDS
        assert service.load(tmp_path / "x.ckpt") == {"x": 1}


def test_slowed_hands_its_options_to_the_store(tmp_path: Path) -> None:
    """With ``overwrite=False``, an option of ``open_store``, a second save of one location fails."""
    with CheckpointService(store_factory=slowed(0.0, overwrite=False)) as service:
        service.save({"x": 1}, tmp_path / "x.ckpt").wait()
        with pytest.raises(StoreError):
            service.save({"x": 2}, tmp_path / "x.ckpt").wait()
