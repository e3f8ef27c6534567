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


@pytest.mark.parametrize(
    "error",
    [
        StoreError("x", location="/a", stage="commit"),
        UnpicklableStateError("x", where="state['f']"),
        FlushError("x", [StoreError("y")]),
        QueueFullError("x"),
    ],
)
def test_errors_cross_processes(error: Exception) -> None:
    """An error can be pickled and copied, as multiprocessing does with it, and says the same afterwards."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        names = [name for name in ("location", "stage", "where") if hasattr(error, name)]
        assert [getattr(again, name) for name in names] == [getattr(error, name) for name in names]
