"""The tree of exceptions: how each can be caught, and that none loses what it knows on its way."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
import re

import pytest

import async_ckpt
from async_ckpt import errors
from async_ckpt.errors import (
    AsyncCheckpointError,
    BackPressureError,
    FlushError,
    FlushTimeoutError,
    MemoryLimitError,
    MissingDependencyError,
    NotDurableError,
    OptionError,
    QueueFullError,
    ServiceClosedError,
    StoreError,
    UnknownProtocolError,
    UnpicklableStateError,
)

ALL = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, AsyncCheckpointError)
]


@pytest.mark.parametrize("error", ALL)
def test_one_base_and_public(error: type[AsyncCheckpointError]) -> None:
    """Every error of ours has one base, is exported, has a docstring, and stands in the tree on top of the module."""
    assert getattr(async_ckpt, error.__name__) is error
    assert error.__doc__
    assert errors.__doc__ is not None
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__)


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (OptionError, ValueError),
        (UnpicklableStateError, TypeError),
        (StoreError, OSError),
        (UnknownProtocolError, ValueError),
        (MissingDependencyError, ImportError),
        (ServiceClosedError, RuntimeError),
        (FlushTimeoutError, TimeoutError),
        (QueueFullError, BackPressureError),
        (MemoryLimitError, BackPressureError),
    ],
)
def test_natural_parents(error: type[Exception], parent: type[Exception]) -> None:
    """What Python has a word for can be caught by that word."""
    assert issubclass(error, parent)


def test_store_error_keeps_what_the_system_said() -> None:
    """A translated error names location and stage, keeps errno, and says what to do."""
    cause = OSError(errno.ENOSPC, "No space left on device")
    error = StoreError.during("write", "/a", cause, "Free some.")
    assert str(error) == "cannot write '/a': No space left on device. Free some."
    assert (error.location, error.stage, error.errno) == ("/a", "write", errno.ENOSPC)
    bare = StoreError.during("read", "/a", KeyError())
    assert str(bare) == "cannot read '/a': KeyError"
    assert bare.errno is None


def test_a_group_keeps_its_type_when_it_is_split() -> None:
    """except* and split give FlushErrors again, with the message."""
    group = FlushError("several failed", [StoreError("a"), NotDurableError("b")])
    ours, rest = group.split(StoreError)
    assert isinstance(ours, FlushError)
    assert isinstance(rest, FlushError)
    assert ours.message == "several failed"
    assert [str(error) for error in rest.exceptions] == ["b"]


def example(kind: type[AsyncCheckpointError]) -> AsyncCheckpointError:
    """Return an error of a kind with all that it can know: its own attributes, the system's, a note."""
    error = FlushError("x", [example(StoreError)]) if kind is FlushError else kind("x")
    values = {"location": "/a", "stage": "commit", "where": "state['f']", "name": "s3fs", "path": "/lib/s3fs"}
    values |= {"errno": errno.ENOSPC, "strerror": "full", "filename": "/a", "filename2": "/b"}
    for name, value in values.items():
        if hasattr(error, name):
            setattr(error, name, value)
    error.__notes__ = ["while it was saved"]  # type: ignore[attr-defined]
    return error


def knowledge(error: BaseException) -> list[object]:
    """Return the type of an error, its words, and every attribute that is data, of those within it as well."""
    values = {name: getattr(error, name, None) for name in dir(error) if not name.startswith("_")}
    known = {
        name: value
        for name, value in values.items()
        if name not in ("args", "exceptions") and not callable(value)
    }
    within = [knowledge(each) for each in getattr(error, "exceptions", ())]
    return [type(error), str(error), error.args[:1], known, getattr(error, "__notes__", None), within]


@pytest.mark.parametrize("kind", ALL)
def test_errors_cross_processes(kind: type[AsyncCheckpointError]) -> None:
    """Any error can be pickled and copied, as multiprocessing does with it, and loses nothing of what it knows."""
    error = example(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert knowledge(again) == knowledge(error)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_number_of_the_system_crosses_processes(protocol: int) -> None:
    """A full disk is still known as such in the process that is told of it."""
    error = StoreError.during("write", "/a", OSError(errno.ENOSPC, "No space left on device"))
    again = pickle.loads(pickle.dumps(error, protocol))
    assert (again.errno, str(again)) == (errno.ENOSPC, str(error))
