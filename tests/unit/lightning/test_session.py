"""What the plugin keeps straight between its requests: rests, interruptions, forks, deadlines."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AbandonedError, AsyncCheckpointIO
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing.faults import Fault, FaultyStore, Gate
from tests.support import reached

FLUSH_SECONDS = 2.0


def faulty(*faults: Fault) -> Callable[[Location, Workers], Store]:
    """Return a ``store_factory`` with *faults*, whose stores count their calls together."""
    calls: Any = None

    def make(location: Location, workers: Workers) -> Store:
        nonlocal calls
        store = FaultyStore(open_store(location, workers=workers), faults)
        calls = store.calls = store.calls if calls is None else calls
        return store

    return make


def broken() -> OSError:
    """Return what a full disk raises, more or less."""
    return OSError("broken")


class Directories:
    """A base whose checkpoints are directories."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if checkpoint["step"] < 0:
            raise broken()
        os.makedirs(path)

    def load_checkpoint(self, path: Any, map_location: Any = None) -> Any:
        return {}

    def remove_checkpoint(self, path: Any) -> None:
        os.rmdir(path)

    def teardown(self) -> None:
        pass


@pytest.mark.parametrize("with_base", [False, True], ids=["own", "base"])
def test_a_handler_that_saves_at_once_leaves_the_interrupted_save_alone(
    tmp_path: Path, with_base: bool
) -> None:
    """A requeue's save from a signal handler, at any line of the plugin's own, costs neither of the two saves (L1)."""
    line = 0
    while _interrupted_at(line, tmp_path / str(line), Directories() if with_base else None):
        assert sorted(os.listdir(tmp_path / str(line))) == ["a.ckpt", "hpc_ckpt_1.ckpt"], line
        line += 1
    assert line > 10


def _interrupted_at(line: int, folder: Path, base: Any) -> bool:
    """Save, and let a handler save when so many lines of the plugin have run; tell whether there were as many."""
    plugin = AsyncCheckpointIO(base)
    left = line
    requeued: list[str] = []

    def requeue(*_: object) -> None:
        requeued.append(str(folder / "hpc_ckpt_1.ckpt"))
        plugin.save_checkpoint({"step": 1}, requeued[-1])

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in ("session.py", "plugin.py"):
            return None
        if event == "line":
            left -= 1
            if left == -1:
                sys.settrace(None)
                signal.raise_signal(signal.SIGUSR1)
        return trace

    before, tracing = signal.signal(signal.SIGUSR1, requeue), sys.gettrace()
    sys.settrace(trace)
    try:
        plugin.save_checkpoint({"step": 2}, str(folder / "a.ckpt"))
    finally:
        sys.settrace(tracing)
        signal.signal(signal.SIGUSR1, before)
        plugin.teardown()
    return bool(requeued)


def test_a_rest_forgets_no_failure(tmp_path: Path) -> None:
    """After a failed save, a load in between lets no removal delete the last good checkpoint (D3)."""
    plugin = AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", calls=[2], error=broken)))
    plugin.save_checkpoint({"step": 1}, tmp_path / "1.ckpt")
    plugin.wait()
    plugin.save_checkpoint({"step": 2}, tmp_path / "2.ckpt")
    with pytest.raises(OSError, match="broken"):
        plugin.wait()
    assert plugin.load_checkpoint(tmp_path / "1.ckpt") == {"step": 1}
    assert not plugin.is_used
    plugin.remove_checkpoint(tmp_path / "1.ckpt")
    plugin.teardown()
    assert os.listdir(tmp_path) == ["1.ckpt"]


def test_an_error_stays_first_that_was_there_before_the_plugin(tmp_path: Path) -> None:
    """A rescue, with a plugin made while an error is handled, that fails itself leaves that error in flight (E2)."""

    def train_or_rescue() -> None:
        try:
            raise ValueError("of the training")
        except ValueError:
            with AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", error=broken))) as plugin:
                plugin.save_checkpoint({"step": 1}, tmp_path / "rescued.ckpt")
            raise

    with pytest.raises(ValueError, match="of the training") as caught:
        train_or_rescue()
    assert any("broken" in note for note in getattr(caught.value, "__notes__", ["broken"]))


def test_no_thread_stays_after_a_failed_synchronous_save(tmp_path: Path) -> None:
    """Outside of a run nobody tears down, whether the save went well or not."""
    before = set(threading.enumerate())
    plugin = AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", error=broken)))
    plugin.synchronous = True
    with pytest.raises(OSError, match="broken"):
        plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert set(threading.enumerate()) <= before


def test_directories_of_a_base_are_removed_in_the_background(tmp_path: Path) -> None:
    """A base that writes directories is as asynchronous as any other, and its failures are told once (E1)."""
    plugin = AsyncCheckpointIO(Directories())
    plugin.save_checkpoint({"step": 1}, str(tmp_path / "1"))
    plugin.wait()
    plugin.save_checkpoint({"step": -1}, str(tmp_path / "2"))
    with pytest.raises(OSError, match="broken"):
        plugin.wait()
    plugin.remove_checkpoint(str(tmp_path / "1"))
    plugin.teardown()
    assert os.listdir(tmp_path) == ["1"]


def test_a_load_through_a_link_waits_for_the_link(tmp_path: Path) -> None:
    """A load of a name that is about to lead elsewhere gives what it will lead to (O1, O2)."""
    gate = Gate()
    plugin = AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", calls=[2], gate=gate)))
    last = tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, tmp_path / "1.ckpt")
    plugin.link(last, tmp_path / "1.ckpt")
    plugin.wait()
    plugin.save_checkpoint({"step": 2}, tmp_path / "2.ckpt")
    plugin.link(last, tmp_path / "2.ckpt")
    reached(gate)
    threading.Timer(0.05, gate.open).start()
    assert plugin.load_checkpoint(last) == {"step": 2}
    plugin.teardown()


def test_a_link_to_itself_is_nothing(tmp_path: Path) -> None:
    """By whichever spelling, a checkpoint is never replaced by a link to itself (D2)."""
    (tmp_path / "alias").symlink_to(".")
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    plugin.link(tmp_path / "a.ckpt", tmp_path / "a.ckpt")
    plugin.link(tmp_path / "alias" / "a.ckpt", tmp_path / "a.ckpt")
    plugin.teardown()
    assert torch.load(tmp_path / "a.ckpt") == {"step": 1}
    assert not (tmp_path / "a.ckpt").is_symlink()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_nothing_pending(tmp_path: Path) -> None:
    """What the parent has under way is not the child's, for names, bars and loggers alike (L1)."""
    gate = Gate()
    plugin = AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", gate=gate)))
    plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    reached(gate)
    child = os.fork()
    if child == 0:  # nothing but the answer: this is a copy of the test runner
        nothing = plugin.will_exist(tmp_path / "a.ckpt") is None and plugin.meter.pending == []
        os._exit(0 if nothing else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert plugin.will_exist(tmp_path / "a.ckpt") is True
    assert len(plugin.meter.pending) == 1
    gate.open()
    plugin.teardown()


def test_the_deadline_of_a_flush_is_not_paid_twice(tmp_path: Path) -> None:
    """Once ``flush_timeout`` has passed, the teardown that follows gives storage that hangs no second one (D4)."""
    gate = Gate()
    plugin = AsyncCheckpointIO(
        store_factory=faulty(Fault(operation="commit", gate=gate)), flush_timeout=FLUSH_SECONDS
    )
    plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    reached(gate)
    try:
        raise KeyError("training's own")
    except KeyError:
        plugin.settle()
    began = time.monotonic()
    with pytest.raises(AbandonedError):
        plugin.teardown()
    assert time.monotonic() - began < FLUSH_SECONDS
    assert os.listdir(tmp_path) == []


def test_what_has_failed_keeps_no_frames_alive(tmp_path: Path) -> None:
    """The plugin's record of a failed save holds none of the memory that its error could be traced to."""
    plugin = AsyncCheckpointIO(store_factory=faulty(Fault(operation="commit", error=broken)))

    class Large:
        """What a frame of the program holds."""

    def training() -> weakref.ref[Large]:
        large = Large()
        plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
        with pytest.raises(OSError, match="broken"):
            plugin.wait()
        return weakref.ref(large)

    held = training()
    plugin.teardown()
    gc.collect()
    assert held() is None
