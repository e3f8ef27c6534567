"""What a program may get wrong, through the whole service: it is told what and where, and the service goes on."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.registry import _registry

from async_ckpt import (
    CheckpointService,
    MissingDependencyError,
    OptionError,
    StoreError,
    UnknownProtocolError,
    UnpicklableStateError,
)
from tests.support import PATIENCE_SECONDS, Harness, gated, number_of, state


class Refusing:
    """An object whose own code fails when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> str:
        raise self.error


def nested(depth: int) -> list[Any]:
    """Return lists in lists."""
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with one of each kind of thing that is no checkpoint."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"no checkpoint")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def goes_on(harness: Harness, directory: Path, before: set[str]) -> None:
    """Check that nothing was accepted or left, and that the service works."""
    assert harness.events == []
    assert harness.service.pending == ()
    assert set(os.listdir(directory)) == before
    harness.service.wait()
    harness.service.save(state(1), directory / "good.ckpt").wait(PATIENCE_SECONDS)
    assert number_of(harness.service.load(directory / "good.ckpt")) == 1


STATES: dict[str, tuple[Any, str]] = {
    "a lambda": ({"hooks": {"on_end": lambda: 0}}, r"state\['hooks'\]\['on_end'\]"),
    "a generator": ({"data": [1, (i for i in ())]}, r"state\['data'\]\[1\]"),
    "an object that raises": ({"a": Refusing(KeyError("mine"))}, r"state\['a'\].*mine"),
    "too deep": (nested(100_000), "nested too deeply"),
}


@pytest.mark.parametrize("what", STATES)
def test_states_that_cannot_be_saved(what: str, directory: Path) -> None:
    """A state that pickle refuses is refused by save, which says where in the state; nothing was accepted (D4)."""
    bad, message = STATES[what]
    before = set(os.listdir(directory))
    with Harness() as harness:
        with pytest.raises(UnpicklableStateError, match=message):
            harness.service.save(bad, directory / "a.ckpt")
        goes_on(harness, directory, before)


def test_a_state_that_ends_the_program(directory: Path) -> None:
    """What is no mere error, as Ctrl-C while the state is pickled, is raised as it is; nothing was accepted (D4)."""
    before = set(os.listdir(directory))
    with Harness() as harness:
        with pytest.raises(KeyboardInterrupt):
            harness.service.save({"a": Refusing(KeyboardInterrupt())}, directory / "a.ckpt")
        goes_on(harness, directory, before)


TARGETS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a directory": (lambda path: path / "directory", StoreError, "directory"),
    "a name that ends as a directory": (lambda path: f"{path}/new/", StoreError, "directory"),
    "below a file": (lambda path: path / "file" / "a.ckpt", StoreError, "Not a directory"),
    "a pipe": (lambda path: path / "fifo", StoreError, "regular file"),
    "a device": (lambda path: "/dev/null", StoreError, "regular file"),
    "a loop of links": (lambda path: path / "loop", StoreError, "symbolic links"),
    "too long a name": (lambda path: path / ("x" * 300), StoreError, "too long"),
    "the root": (lambda path: "/", OptionError, "does not name a file"),
    "nothing": (lambda path: "", OptionError, "must not be empty"),
    "not a path": (lambda path: 3, TypeError, "str or a path, not int"),
    "a URL made a path": (lambda path: Path("s3://bucket/a.ckpt"), OptionError, "lost a slash"),
    "a chained URL": (lambda path: "simplecache::s3://bucket/a.ckpt", OptionError, "chained"),
    "a chain to a path": (lambda path: f"simplecache::{path}/a.ckpt", OptionError, "chained"),
    "no protocol": (lambda path: "nonsense://a.ckpt", UnknownProtocolError, "nonsense://"),
}


@pytest.mark.parametrize("what", TARGETS)
def test_places_where_no_checkpoint_can_be(what: str, directory: Path) -> None:
    """A place that cannot be a checkpoint's is told of at the call or by the handle; nothing is left there (E1, D2)."""
    place, error, message = TARGETS[what]
    before = set(os.listdir(directory))
    with Harness() as harness:
        with pytest.raises(error, match=message):
            harness.service.save(state(1), place(directory)).wait(PATIENCE_SECONDS)
        harness.events.clear()
        goes_on(harness, directory, before)


@pytest.mark.parametrize(
    ("protocol", "package", "extra"),
    [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")],
)
@pytest.mark.parametrize("call", ["save", "load", "remove"])
def test_a_package_that_is_not_installed(
    call: str, protocol: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """Where the file system's package is missing, every call says which extra brings it."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)  # where another test has used it
    before = set(os.listdir(directory))
    with Harness() as harness:
        arguments = [state(1)] if call == "save" else []
        with pytest.raises(MissingDependencyError, match=rf'pip install "async-ckpt\[{extra}\]"'):
            getattr(harness.service, call)(*arguments, f"{protocol}://bucket/a.ckpt")
        goes_on(harness, directory, before)


LOADS: dict[str, tuple[str, type[Exception]]] = {
    "nothing": ("missing.ckpt", FileNotFoundError),
    "a directory": ("directory", StoreError),
    "a loop of links": ("loop", StoreError),
    "no checkpoint": ("file", Exception),  # which one is torch's own choice
}


@pytest.mark.parametrize("what", LOADS)
def test_loads_of_what_is_no_checkpoint(what: str, directory: Path) -> None:
    """A load that fails is told by itself alone, and the place is free for the next save at once (E1, O1)."""
    name, error = LOADS[what]
    with Harness() as harness:
        harness.service.save(state(1), directory / "first.ckpt").wait(
            PATIENCE_SECONDS
        )  # so that there is a queue
        harness.events.clear()
        before = set(os.listdir(directory))
        with pytest.raises(error):
            harness.service.load(directory / name)
        goes_on(harness, directory, before)


def test_a_load_that_would_run_code(directory: Path) -> None:
    """A checkpoint that names code is loaded only by who asks for it with weights_only=False (S2)."""
    with Harness() as harness:
        harness.service.save({"path": directory}, directory / "a.ckpt")
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            harness.service.load(directory / "a.ckpt")
        assert harness.service.load(directory / "a.ckpt", weights_only=False) == {"path": directory}
        (directory / "a.ckpt").unlink()


def test_a_handle_cannot_be_copied() -> None:
    """Copying or pickling a handle is refused, as nobody would ever end the copy; a state with one says where (B2)."""
    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"memory://a.*keep its url"):
                copied(handle)
        with pytest.raises(UnpicklableStateError, match=r"state\['last'\].*keep its url"):
            harness.service.save({"last": handle}, "memory://b")
        gate.open()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_broken_callback_harms_nothing(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """What a handle's callback raises on the loop thread is logged, and the service goes on."""

    def callback(_: object) -> None:
        raise error("broken")

    gate, hold = gated()
    with Harness(hold, memory=True) as harness:
        handle = harness.service.save(state(1), "memory://a")
        handle.add_done_callback(callback)
        gate.open()
        handle.wait(PATIENCE_SECONDS)
        harness.service.save(state(2), "memory://b").wait(PATIENCE_SECONDS)
    assert "broken" in caplog.text


def test_a_refused_option_starts_nothing() -> None:
    """A service whose options cannot work does not come to be (B2)."""
    with pytest.raises(OptionError, match="queue_depth=0"):
        CheckpointService(queue_depth=0)


def test_what_is_there_stays_when_a_save_is_refused(directory: Path) -> None:
    """A refused save of a place leaves the checkpoint that is there as it is (D2)."""
    torch.save(state(7), directory / "a.ckpt")
    with Harness() as harness:
        with pytest.raises(UnpicklableStateError):
            harness.service.save({"hook": lambda: 0}, directory / "a.ckpt")
        assert number_of(harness.service.load(directory / "a.ckpt")) == 7


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors carry notes from Python 3.11 on")
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    """Torch's own error is raised as it is, with a note that names the file."""
    (tmp_path / "junk.ckpt").write_bytes(b"this is no checkpoint")
    with CheckpointService() as service, pytest.raises(Exception) as caught:
        service.load(tmp_path / "junk.ckpt")
    assert any("junk.ckpt" in note for note in caught.value.__notes__)
