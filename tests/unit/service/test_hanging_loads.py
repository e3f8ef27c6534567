"""Loads from storage that hangs: who gives up is free within seconds, and no memory is freed that may be written to.

The storage is a local one whose system calls, each in a thread of its own, do not return: what a network file system
does whose server has gone.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService
from async_ckpt.engine import runtime
from async_ckpt.errors import AbandonedError, ServiceClosedError
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.store import LocalStore
from tests.archives import written
from tests.loads import PADDING
from tests.support import PATIENCE_SECONDS

#: Anything that waits for storage which hangs waits for ever; this is for a slow machine.
SOON_SECONDS = 8.0
LARGE = {"a": torch.arange(3_000_000), "b": torch.arange(1_000_000)}
#: How torch is asked: storages filled last, record by record, in part; of another kind of file.
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "record by record": {"map_location": lambda storage, _: storage},
    "a part": {"keys": "a"},
    "the old format": {},
}


class Hanging(Disk):
    """A disk whose *number*-th call of a kind hangs, and all after it, until `answer` is called."""

    def __init__(self, kind: str, number: int) -> None:
        self.reached = threading.Event()
        self.answers = threading.Event()
        self.late: list[int] = []
        self.owners: set[type] = set()  # of the memory that reads were given
        self._kind = kind
        self._left = number
        self._lock = threading.Lock()

    def _hang(self, kind: str) -> bool:
        with self._lock:
            self._left -= kind == self._kind
            hangs = kind == self._kind and self._left <= 0
        if hangs:
            self.reached.set()
            self.answers.wait()
        return hangs

    def open_to_read(self, path: str) -> int:
        self._hang("open")
        return super().open_to_read(path)

    def fstat(self, fd: int) -> os.stat_result:
        self._hang("size")
        return super().fstat(fd)

    def read(self, fd: int, target: memoryview, start: int) -> int:
        self.owners.add(type(getattr(target.obj, "owner", target.obj)))
        late = self._hang("read")
        count = super().read(fd, target, start)
        if late:
            self.late.append(count)
        return count


@contextmanager
def hanging(kind: str, number: int = 1) -> Iterator[tuple[CheckpointService, Hanging]]:
    """Give a service on a disk that hangs; at the end it answers, and what was left behind ends."""
    disk = Hanging(kind, number)
    service = CheckpointService(store_factory=lambda _, workers: LocalStore(workers=workers, disk=disk))
    with ended_at_last(service, disk):
        yield service, disk


@contextmanager
def ended_at_last(service: CheckpointService, disk: Hanging) -> Iterator[None]:
    """At the end have the disk answer, and what was left behind end."""
    try:
        yield
    finally:
        disk.answers.set()
        service.close()
        for thread in threading.enumerate():
            if thread.name.startswith("async_ckpt"):
                thread.join(PATIENCE_SECONDS)
        assert runtime.current() is None


@contextmanager
def soon() -> Iterator[None]:
    """Fail where the body takes long."""
    began = monotonic()
    yield
    assert monotonic() - began < SOON_SECONDS


def checkpoint(folder: Path, way: str = "whole") -> Path:
    """Write a file of a kind; return where."""
    path = folder / "x.ckpt"
    path.write_bytes(written(LARGE, _use_new_zipfile_serialization=way != "the old format"))
    return path


def loading(
    service: CheckpointService, path: Path, errors: list[BaseException], **options: Any
) -> threading.Thread:
    """Load in another thread, and note what that raises."""

    def load() -> None:
        try:
            service.load(path, **options)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    return thread


HANGS = [("whole", "open", 1), ("whole", "size", 1), ("whole", "read", 1)]
HANGS += [(way, "read", 2) for way in WAYS]


@pytest.mark.parametrize(("way", "kind", "number"), HANGS)
def test_close_does_not_wait_for_storage(tmp_path: Path, way: str, kind: str, number: int) -> None:
    """Whatever hangs, the opening, the size, the directory or the data, close returns, and the load is told (B2)."""
    path, errors = checkpoint(tmp_path, way), list[BaseException]()
    with hanging(kind, number) as (service, disk):
        thread = loading(service, path, errors, **WAYS[way])
        assert disk.reached.wait(PATIENCE_SECONDS)
        with soon():
            service.close(timeout=1)
            thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert {type(error) for error in errors} <= {ServiceClosedError}


class HangingInAll(Hanging):
    """One on which writes hang as well."""

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        self.writing.set()
        self.answers.wait()
        return super().write(fd, pieces, offset)

    def __init__(self) -> None:
        super().__init__("read", 1)
        self.writing = threading.Event()


def test_close_tells_a_load_also_where_a_save_hangs(tmp_path: Path) -> None:
    """Where the thread of a save has to be left behind, loads are given up all the same (B2)."""
    path, errors = checkpoint(tmp_path), list[BaseException]()
    disk = HangingInAll()
    service = CheckpointService(
        store_factory=lambda _, workers: LocalStore(workers=workers, disk=disk), abandon_grace_seconds=0.1
    )
    with ended_at_last(service, disk):
        handle = service.save({"n": torch.zeros(3)}, tmp_path / "other.ckpt")
        thread = loading(service, path, errors)
        assert disk.reached.wait(PATIENCE_SECONDS)
        assert disk.writing.wait(PATIENCE_SECONDS)
        with soon():
            with suppress(AbandonedError):
                service.close(timeout=0.1)
            thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
        with pytest.raises(AbandonedError):
            handle.wait()
    assert [type(error) for error in errors] == [ServiceClosedError]


@pytest.mark.parametrize("way", ["whole", "record by record"])
def test_ctrl_c_does_not_wait_for_storage(tmp_path: Path, way: str) -> None:
    """Ctrl-C in a load that hangs is raised soon; another service then works while the first still hangs (B2)."""
    path = checkpoint(tmp_path, way)
    with hanging("read", 2) as (service, disk):

        def interrupt() -> None:
            if disk.reached.wait(PATIENCE_SECONDS):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with soon(), pytest.raises(KeyboardInterrupt):
            service.load(path, **WAYS[way])
        interrupting.join()
        with soon():
            service.close()
            with CheckpointService() as other:
                torch.testing.assert_close(other.load(path), LARGE)


def test_several_loads_that_hang_are_not_waited_for_one_by_one(tmp_path: Path) -> None:
    """Close leaves any number of loads behind as soon as one."""
    path, errors = checkpoint(tmp_path), list[BaseException]()
    with hanging("read", 2) as (service, disk):
        threads = [loading(service, path, errors) for _ in range(6)]
        assert disk.reached.wait(PATIENCE_SECONDS)
        with soon():
            service.close(timeout=1)
            for thread in threads:
                thread.join(PATIENCE_SECONDS)
    assert [type(error) for error in errors] == [ServiceClosedError] * 6


def test_saves_become_durable_beside_a_load_that_hangs(tmp_path: Path) -> None:
    """What was accepted is written before close gives the load up, and nothing temporary stays (D4)."""
    path, errors = checkpoint(tmp_path), list[BaseException]()
    with hanging("read", 2) as (service, disk):
        loading(service, path, errors)
        assert disk.reached.wait(PATIENCE_SECONDS)
        service.save(PADDING, tmp_path / "y.ckpt")
        with soon():
            service.close()
        torch.testing.assert_close(torch.load(tmp_path / "y.ckpt"), PADDING)


@pytest.mark.parametrize("way", WAYS)
def test_memory_lives_as_long_as_it_may_be_written_to(tmp_path: Path, way: str) -> None:
    """What a read writes to that comes back after the load was given up is no memory of anybody else's by then (S1).

    The view that a read is given owns what it shows: a buffer of ours, or the very storage, which torch cannot free.
    """
    path, errors = checkpoint(tmp_path, way), list[BaseException]()
    with hanging("read", 4 if way == "whole" else 3) as (service, disk):
        thread = loading(service, path, errors, **WAYS[way])
        assert disk.reached.wait(PATIENCE_SECONDS)
        service.close(timeout=1)
        thread.join(PATIENCE_SECONDS)
        errors.clear()
        gc.collect()
        others = [torch.full((500_000,), 7) for _ in range(40)]  # takes what was freed
    assert disk.late
    assert disk.owners == ({bytearray, torch.UntypedStorage} if way == "whole" else {bytearray})
    assert all((each == 7).all() for each in others)


@pytest.mark.parametrize("act", [CheckpointService.close, lambda service: None], ids=["close", "nothing"])
def test_a_read_that_comes_back_late_lets_go_of_everything(
    tmp_path: Path, act: Callable[[CheckpointService], object]
) -> None:
    """Once storage answers, the threads that were left behind end, the file is closed, and the memory is free (B2)."""
    path, errors = checkpoint(tmp_path), list[BaseException]()
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with hanging("read", 3) as (service, disk):
        loading(service, path, errors)
        assert disk.reached.wait(PATIENCE_SECONDS)
        act(service)
    assert not [t for t in threading.enumerate() if t.name.startswith("async_ckpt")]
    if before:
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 3
