"""Events as values."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import time

import pytest

from async_ckpt import events
from async_ckpt.events import Accepted, Event, PartWritten

ALL = [value for value in vars(events).values() if inspect.isclass(value) and issubclass(value, Event)]


@pytest.mark.parametrize("event", ALL)
def test_events_are_frozen_values(event: type[Event]) -> None:
    """Every event is frozen, slotted, keyword-only, exported and described."""
    assert event.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(event)
    assert all(item.kw_only for item in dataclasses.fields(event))
    assert event.__name__ in events.__all__
    assert event.__doc__


def test_an_event_tells_when_and_of_what() -> None:
    """An event carries its request, its location as the caller wrote it, and the time; it can be pickled."""
    before = time.time()
    event = Accepted(request_id=3, url="s3://b/a", nbytes=7)
    assert before <= event.time_seconds <= time.time()
    assert pickle.loads(pickle.dumps(event)) == event
    assert PartWritten(request_id=1, url="a", index=0, nbytes=1, time_seconds=0.0).time_seconds == 0
