"""What a call costs where every look at a path takes a third of a second, as on a busy cluster file system."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointIO, CheckpointService
from tests.support import state

_CALLS = ("access", "listdir", "lstat", "mkdir", "open", "readlink", "scandir", "stat", "statvfs", "unlink")


class Watch:
    """The calls with a path that this thread makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._is_on = False
        here = threading.get_ident()

        def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if self._is_on and threading.get_ident() == here:
                    self.calls.append((name, args[0]))
                return real(*args, **options)

            return call

        for name in _CALLS:
            monkeypatch.setattr(os, name, watched(name, getattr(os, name)))

    @contextmanager
    def on(self) -> Iterator[list[tuple[str, Any]]]:
        """Give the calls that are made in the body."""
        self.calls = []
        self._is_on = True
        try:
            yield self.calls
        finally:
            self._is_on = False


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Watch the calls of this thread."""
    return Watch(monkeypatch)


@pytest.fixture(params=["itself", "by a link"])
def deep(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory far below others, or a link to it."""
    folder = tmp_path.joinpath(*"abcdefghijk")
    folder.mkdir(parents=True)
    if request.param == "itself":
        return folder
    (tmp_path / "link").symlink_to(folder)
    return tmp_path / "link"


@pytest.mark.parametrize("name", ["new.ckpt", "first.ckpt"])
def test_a_save_to_a_known_directory(watch: Watch, deep: Path, name: str) -> None:
    """It takes four calls with a path at the most, to a new file and over an old one."""
    with CheckpointService(durability="process") as service:
        service.save(state(1), deep / "first.ckpt").wait()
        with watch.on() as calls:
            service.save(state(2), deep / name)
        assert 0 < len(calls) <= 4, calls


def test_a_removal_and_a_load_in_a_known_directory(watch: Watch, deep: Path) -> None:
    """A removal takes two; a load looks twice where it is, as links may change until its turn."""
    with CheckpointService(durability="process") as service:
        service.save(state(1), deep / "first.ckpt").wait()
        with watch.on() as calls:
            service.load(deep / "first.ckpt")
        assert 0 < len(calls) <= 8, calls
        with watch.on() as calls:
            service.remove(deep / "first.ckpt")
        assert 0 < len(calls) <= 2, calls


def test_a_save_by_the_plugin(watch: Watch, deep: Path) -> None:
    """So does a save that Lightning asks for, with our own writer."""
    plugin = AsyncCheckpointIO(durability="process")
    plugin.save_checkpoint(state(1), deep / "first.ckpt")
    plugin.wait()
    with watch.on() as calls:
        plugin.save_checkpoint(state(2), deep / "new.ckpt")
    plugin.teardown()
    assert 0 < len(calls) <= 4, calls


def test_the_way_to_a_new_directory_is_gone_once(watch: Watch, tmp_path: Path) -> None:
    """No step of it is asked twice whether it is a link."""
    with CheckpointService(durability="process") as service, watch.on() as calls:
        service.save(state(1), tmp_path.joinpath(*"abcdefghijk", "first.ckpt"))
    links = [path for name, path in calls if name == "readlink"]
    assert len(links) == len(set(links)) > 11
