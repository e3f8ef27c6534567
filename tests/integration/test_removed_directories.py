"""A directory that was there when a save was asked for, and is gone at its turn, is not made again by that save."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO, CheckpointService, StoreError
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local import LocalStore
from async_ckpt.testing.faults import Fault, FaultyStore, Gate
from tests.support import PATIENCE_SECONDS

pytestmark = pytest.mark.integration

STATE = {"w": torch.arange(10.0)}


class Held:
    """A service whose first save is held at its commit, in a directory of its own, so that others wait behind it."""

    def __init__(self, folder: Path, *, fails: bool = False) -> None:
        self.gate = Gate()
        error = (lambda: OSError("no space")) if fails else None
        self._faults = [
            Fault(operation="commit", calls=[1], gate=self.gate),
            *([Fault(operation="commit", calls=[1], error=error)] if error else []),
        ]
        self._calls: Any = None
        self.service = CheckpointService(store_factory=self._make, queue_depth=8, on_error="raise")
        self.first = self.service.save(STATE, folder / "first" / "a.ckpt")

    def _make(self, location: Location, workers: Workers) -> Store:
        store = FaultyStore(open_store(location, workers=workers), self._faults)
        self._calls = store.calls = store.calls if self._calls is None else self._calls
        return store


def test_a_directory_that_was_removed_stays_away(tmp_path: Path) -> None:
    """The save ends with an error that says so, and what comes later goes on."""
    held = Held(tmp_path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    with held.service as service:
        lost = service.save(STATE, folder / "a.ckpt")
        shutil.rmtree(folder)
        held.gate.open()
        with pytest.raises(StoreError, match="has been removed since the save was asked for") as raised:
            lost.wait()
        assert raised.value.errno == errno.ENOENT
        assert not folder.exists()
        service.save(STATE, folder / "b.ckpt").wait()  # it is not there now, and so it is made
    assert [path.name for path in folder.iterdir()] == ["b.ckpt"]


def test_a_directory_that_was_not_there_is_made(tmp_path: Path) -> None:
    """Of any depth, whoever else waits."""
    held = Held(tmp_path)
    with held.service as service:
        handle = service.save(STATE, tmp_path / "new" / "deep" / "a.ckpt")
        held.gate.open()
        handle.wait()
    assert (tmp_path / "new" / "deep" / "a.ckpt").exists()


@pytest.mark.parametrize("removed", ["run", "run/deep"])
def test_a_directory_that_the_service_has_removed_is_made_again(tmp_path: Path, removed: str) -> None:
    """A save that was accepted after the removal of its directory comes after it (O1), and makes what it needs."""
    held = Held(tmp_path)
    folder = tmp_path / "run" / "deep"
    folder.mkdir(parents=True)
    (folder / "old.ckpt").touch()
    with held.service as service:
        service.remove(tmp_path / removed)
        handle = service.save(STATE, folder / "new.ckpt")
        held.gate.open()
        handle.wait()
    assert [path.name for path in folder.iterdir()] == ["new.ckpt"]


def test_a_directory_that_another_save_has_made_and_given_up_is_made_again(tmp_path: Path) -> None:
    """A save that fails takes the directory away that it had made; one that has seen it there makes it again."""
    held = Held(tmp_path, fails=True)
    held.gate.reached.wait(30)
    assert (tmp_path / "first").is_dir()
    with held.service as service:
        handle = service.save(STATE, tmp_path / "first" / "b.ckpt")
        held.gate.open()
        with pytest.raises(OSError, match="no space"):
            held.first.wait()
        handle.wait()
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["b.ckpt"]


@pytest.mark.parametrize("base", [False, True], ids=["own writer", "base"])
def test_the_plugin_does_not_make_it_again_either(tmp_path: Path, base: bool) -> None:
    """Neither our own writer, for which the plugin makes a missing directory at the call, nor Lightning's, which would
    make one as it writes; a directory that was not there is made by both.
    """
    from lightning.fabric.plugins import TorchCheckpointIO

    gate = Gate()

    class Slow(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if "first" in str(path):
                gate.reached.set()
                assert released.wait(30)
            super().save_checkpoint(checkpoint, path)

    from threading import Event

    released = Event()
    folder = tmp_path / "temporary"
    folder.mkdir()

    def make(location: Location, workers: Workers) -> Store:
        return FaultyStore(
            open_store(location, workers=workers), [Fault(operation="commit", calls=[1], gate=gate)]
        )

    plugin = (
        AsyncCheckpointIO(Slow(), queue_depth=8)
        if base
        else AsyncCheckpointIO(store_factory=make, queue_depth=8)
    )
    plugin.save_checkpoint(STATE, tmp_path / "first.ckpt")
    assert gate.reached.wait(30)
    plugin.save_checkpoint(STATE, folder / "a.ckpt")
    plugin.save_checkpoint(STATE, tmp_path / "new" / "a.ckpt")
    shutil.rmtree(folder)
    gate.open()
    released.set()
    with pytest.raises(StoreError, match="has been removed since the save was asked for"):
        plugin.wait()
    plugin.teardown()
    assert not folder.exists()
    assert (tmp_path / "new" / "a.ckpt").exists()


class HoldsRemoval(Disk):
    """A disk on which a directory is removed once the gate is open."""

    def __init__(self) -> None:
        self.reached, self.may_go = threading.Event(), threading.Event()

    def rmtree(self, path: str) -> None:
        """Remove it, when it may."""
        self.reached.set()
        self.may_go.wait(PATIENCE_SECONDS)
        super().rmtree(path)


def test_a_directory_that_is_seen_while_the_service_removes_it_is_made_again(tmp_path: Path) -> None:
    """A save that is asked for in the midst of a removal comes after it, although it saw the directory (O1)."""
    disk = HoldsRemoval()
    with CheckpointService(
        store_factory=lambda _, workers: LocalStore(workers=workers, disk=disk)
    ) as service:
        service.save(STATE, tmp_path / "run" / "old.ckpt").wait()
        service.remove(tmp_path / "run")
        assert disk.reached.wait(PATIENCE_SECONDS)
        handle = service.save(STATE, tmp_path / "run" / "new.ckpt")
        disk.may_go.set()
        handle.wait()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["new.ckpt"]
