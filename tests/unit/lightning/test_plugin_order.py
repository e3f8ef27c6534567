"""Order and errors of what goes through the plugin to a base CheckpointIO."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import (
    AsyncCheckpointIO,
    FlushError,
    QueueFullError,
)
from async_ckpt.events import Event, Failed
from tests.unit.lightning.bases import WAIT_SECONDS, Blocked, Broken


def test_base_runs_one_at_a_time(tmp_path: Path) -> None:
    """Saves of different paths are given to a base one after the other, whatever the plugin's options."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=4, max_concurrent_saves=4)
    for name in "abcd":
        plugin.save_checkpoint({"name": name}, tmp_path / name)
    assert base.entered.wait(WAIT_SECONDS)
    base.go.set()
    plugin.teardown()
    assert base.most_at_a_time == 1
    assert list(base.saved) == [str(tmp_path / name) for name in "abcd"]


def test_load_waits_for_its_own_path_only(tmp_path: Path) -> None:
    """A load returns while the save of another path is under way (O2)."""
    base = Blocked()
    base.go.set()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"a": 1}, tmp_path / "a")
    plugin.wait()
    base.go.clear()
    base.entered.clear()
    plugin.save_checkpoint({"b": 1}, tmp_path / "b")
    assert base.entered.wait(WAIT_SECONDS)
    assert plugin.load_checkpoint(tmp_path / "a") == {"a": 1}
    base.go.set()
    assert plugin.load_checkpoint(tmp_path / "b") == {"b": 1}
    plugin.teardown()


def test_removal_follows_the_saves_before_it(tmp_path: Path) -> None:
    """A base deletes the old checkpoint only after it has written the new one (D3)."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=4)
    plugin.save_checkpoint({"n": 1}, tmp_path / "old")
    plugin.save_checkpoint({"n": 2}, tmp_path / "new")
    plugin.remove_checkpoint(tmp_path / "old")
    assert base.calls == []
    base.go.set()
    plugin.teardown()
    assert [call for call, _ in base.calls] == ["save", "save", "remove"]
    assert list(base.saved) == [str(tmp_path / "new")]


def test_removal_is_dropped_where_the_new_save_failed(tmp_path: Path) -> None:
    """Where a base fails to write the new checkpoint, it is not asked to delete the old one (D3)."""
    base = Broken()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"n": 1}, tmp_path / "good")
    plugin.save_checkpoint({"n": 2}, tmp_path / "bad")
    with pytest.raises(KeyError):
        plugin.wait()
    plugin.teardown()

    plugin.save_checkpoint({"n": 2}, tmp_path / "bad2")
    with pytest.raises(KeyError):
        _remove_and_end(plugin, tmp_path / "good")
    assert list(base.saved) == [str(tmp_path / "good")]


def _remove_and_end(plugin: AsyncCheckpointIO, path: Path) -> None:
    try:
        plugin.remove_checkpoint(path)
    finally:
        plugin.teardown()


def test_bases_error_is_raised_once_as_it_is(tmp_path: Path) -> None:
    """An error of the base is raised once, of its own type, with the traceback of the worker (E1)."""
    plugin = AsyncCheckpointIO(Broken())
    plugin.save_checkpoint({"a": 1}, tmp_path / "bad")
    with pytest.raises(KeyError, match="the base broke") as caught:
        plugin.wait()
    trace = traceback.format_exception(caught.value)
    assert any("raise KeyError" in line for line in trace)
    plugin.wait()
    plugin.save_checkpoint({"a": 1}, tmp_path / "good")
    plugin.teardown()


def test_several_errors_come_together(tmp_path: Path) -> None:
    """Several failed saves that nobody was told of come as one ``FlushError`` from ``teardown`` (E1)."""
    blocker = Blocked()

    class Both(Broken):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            assert blocker.go.wait(WAIT_SECONDS)
            super().save_checkpoint(*args, **kwargs)

    plugin = AsyncCheckpointIO(Both(), queue_depth=3)
    for name in ("bad1", "bad2", "good"):
        plugin.save_checkpoint({"a": 1}, tmp_path / name)
    blocker.go.set()
    with pytest.raises(FlushError) as caught:
        plugin.teardown()
    assert [type(error) for error in caught.value.exceptions] == [KeyError, KeyError]
    plugin.teardown()


def test_next_save_raises_the_error_and_is_accepted(tmp_path: Path) -> None:
    """A save never raises its own failure, however soon it comes; the next one does, and is accepted (E1, E2)."""
    base, failed = Broken(), threading.Event()

    def observer(event: Event) -> None:
        if isinstance(event, Failed):
            failed.set()

    plugin = AsyncCheckpointIO(base, observer=observer)
    for number in range(20):
        failed.clear()
        plugin.save_checkpoint({"a": 1}, tmp_path / "bad")
        assert failed.wait(WAIT_SECONDS)
        with pytest.raises(KeyError):
            plugin.save_checkpoint({"a": number}, tmp_path / "good")
        plugin.wait()
        assert base.saved[str(tmp_path / "good")] == {"a": number}
    plugin.teardown()


def test_full_queue_may_be_an_error(tmp_path: Path) -> None:
    """With ``overflow="raise"`` a save that finds no place is refused at the call (B1)."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=1, overflow="raise")
    plugin.save_checkpoint({"a": 1}, tmp_path / "a")
    with pytest.raises(QueueFullError):
        plugin.save_checkpoint({"a": 2}, tmp_path / "b")
    base.go.set()
    plugin.teardown()
    assert list(base.saved) == [str(tmp_path / "a")]
