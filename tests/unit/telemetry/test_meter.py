"""What a meter adds up."""

from __future__ import annotations

from typing import Any

import pytest

from async_ckpt.events import (
    Abandoned,
    Accepted,
    Cancelled,
    Durable,
    Event,
    Failed,
    LaidOut,
    PartWritten,
    Removed,
    Staged,
    Superseded,
)
from async_ckpt.telemetry.meter import Meter


def tell(meter: Meter, kind: type[Event], request_id: int = 1, **values: Any) -> None:
    """Tell *meter* of an event of a save of ``a``."""
    meter(kind(request_id=request_id, url="a", **values))


def test_a_save_from_its_acceptance_to_its_end() -> None:
    """Bytes, stall, copying and duration come from the events; once ended, a save is told of once."""
    meter = Meter()
    tell(meter, Accepted, nbytes=90, time_seconds=10.0)
    tell(meter, Staged, stall_seconds=3.0, time_seconds=12.0)
    tell(meter, LaidOut, nbytes=100, parts=2)
    tell(meter, PartWritten, index=0, nbytes=60)
    (save,) = meter.pending
    assert (save.nbytes, save.written_bytes, save.stall_seconds, save.staged_seconds) == (100, 60, 3.0, 2.0)
    tell(meter, Durable, nbytes=100, seconds=7.0)
    assert meter.pending == []
    (ended,) = meter.take_ended()
    assert (ended.durable_seconds, ended.end) == (7.0, Durable)
    assert meter.take_ended() == []


def test_a_file_that_is_sent_again_begins_at_nothing() -> None:
    """Where a whole file is repeated, what was written of the first attempt does not count."""
    meter = Meter()
    tell(meter, Accepted, nbytes=90)
    for _ in range(2):
        tell(meter, LaidOut, nbytes=100, parts=2)
        tell(meter, PartWritten, index=0, nbytes=60)
    assert meter.pending[0].written_bytes == 60


def test_the_length_of_what_a_base_wrote_is_that_of_the_snapshot() -> None:
    """A base CheckpointIO tells no length."""
    meter = Meter()
    tell(meter, Accepted, nbytes=90)
    tell(meter, Durable, nbytes=0, seconds=1.0)
    assert meter.take_ended()[0].nbytes == 90


@pytest.mark.parametrize("end", [Superseded, Cancelled, Abandoned])
def test_every_end_ends_it(end: type[Event]) -> None:
    """A save that came to nothing is pending no more, and says how it ended."""
    meter = Meter()
    tell(meter, Accepted, nbytes=1)
    tell(meter, Accepted, request_id=2, nbytes=1)
    tell(meter, end)
    assert [save.request_id for save in meter.pending] == [2]
    tell(meter, Failed, request_id=2, error=OSError())
    assert [save.end for save in meter.take_ended()] == [end, Failed]


def test_removals_are_not_its_business() -> None:
    """What was never accepted as a save is passed over."""
    meter = Meter()
    tell(meter, Removed)
    assert (meter.pending, meter.take_ended()) == ([], [])
