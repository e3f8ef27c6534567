"""Places and states that cannot be saved, refused at the call where that can be known."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import OptionError, StoreError, UnknownProtocolError, UnpicklableStateError
from tests.support import PATIENCE_SECONDS, Harness, state
from tests.unit.service.calls import CLOSED_CALLS


def nothing_left(directory: Path) -> bool:
    """Tell whether nothing was made in *directory*."""
    return not os.listdir(directory)


def test_unpicklable_state(tmp_path: Path) -> None:
    """An object that pickle refuses is refused by save, which says where it is; the service goes on."""
    with Harness() as harness:
        with pytest.raises(UnpicklableStateError, match=r"state\['callbacks'\]\[1\]") as raised:
            harness.service.save({"callbacks": [1, threading.Lock()]}, tmp_path / "a.ckpt")
        assert raised.value.where == "state['callbacks'][1]"
        assert harness.events == []
        assert nothing_left(tmp_path)
        harness.service.save(state(1), tmp_path / "a.ckpt").wait(PATIENCE_SECONDS)


def test_directory_as_path(tmp_path: Path) -> None:
    """A path that is a directory is refused by save."""
    with Harness() as harness:
        with pytest.raises(StoreError, match="directory"):
            harness.service.save(state(1), tmp_path)
        assert nothing_left(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    """A directory in which this user may not write is refused by save."""
    tmp_path.chmod(0o500)
    try:
        with Harness() as harness, pytest.raises(StoreError, match=r"write|permission"):
            harness.service.save(state(1), tmp_path / "a.ckpt")
    finally:
        tmp_path.chmod(0o700)
    assert nothing_left(tmp_path)


def test_a_place_that_only_the_store_can_refuse() -> None:
    """Where only the attempt can tell that nothing can be written, the handle tells, with location and stage (E1)."""
    with Harness() as harness:
        handle = harness.service.save(state(1), "/proc/async_ckpt-test.ckpt")
        with pytest.raises(StoreError, match=r"/proc/async_ckpt-test\.ckpt") as raised:
            handle.wait(PATIENCE_SECONDS)
        assert raised.value.stage == "begin"


def test_file_as_parent(tmp_path: Path) -> None:
    """A parent that is a file is refused by save."""
    (tmp_path / "file").write_text("")
    with Harness() as harness, pytest.raises(StoreError):
        harness.service.save(state(1), tmp_path / "file" / "a.ckpt")


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_unknown_protocol(call: str) -> None:
    """A protocol that no file system answers to is refused at the call."""
    with Harness() as harness, pytest.raises(UnknownProtocolError, match="nonsense://"):
        getattr(harness.service, call)(*([state(1)] if call == "save" else []), "nonsense://a/b")


@pytest.mark.parametrize("place", [None, 3, b"a.ckpt", "", "  ", "a\0b"])
def test_wrong_places(place: Any) -> None:
    """What is no path is refused at the call, with TypeError or OptionError."""
    with Harness() as harness, pytest.raises((TypeError, OptionError)):
        harness.service.save(state(1), place)
