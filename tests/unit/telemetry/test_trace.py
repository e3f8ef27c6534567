"""What is drawn from which events, and that it keeps to the rules of the trace format."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.events import (
    Abandoned,
    Accepted,
    Begun,
    Cancelled,
    Committing,
    Durable,
    Event,
    Failed,
    LaidOut,
    Linked,
    PartWritten,
    RemovalDropped,
    Removed,
    Staged,
    Superseded,
    Swept,
    Writing,
)
from async_ckpt.telemetry.trace import Span, trace_of

URL = "s3://b/run/7.ckpt"
Record = dict[str, Any]


def _life(number: int = 1, *, at: float = 100.0, url: str = URL) -> list[Event]:
    """Return a save that stalled for 2 s, of which 1 s for room, and was durable after 7 s."""
    which: Any = {"request_id": number, "url": url}
    return [
        Accepted(**which, time_seconds=at + 1, nbytes=90),
        Staged(**which, time_seconds=at + 2, stall_seconds=2.0),
        Writing(**which, time_seconds=at + 3),
        LaidOut(**which, time_seconds=at + 3, nbytes=100, parts=2),
        Begun(**which, time_seconds=at + 3),
        PartWritten(**which, time_seconds=at + 4, index=1, nbytes=40),
        PartWritten(**which, time_seconds=at + 5, index=0, nbytes=60),
        Committing(**which, time_seconds=at + 5),
        Durable(**which, time_seconds=at + 7, nbytes=100, seconds=7.0),
    ]


def _records(events: list[Event], *spans: Span, now: float = 200.0) -> list[Record]:
    records: list[Record] = trace_of(events, spans, now_seconds=now)["traceEvents"]
    return records


def _titles(records: list[Record]) -> dict[int, str]:
    return {r["tid"]: r["args"]["name"] for r in records if r["name"] == "thread_name"}


def _slices(records: list[Record]) -> list[tuple[str, str, float, float]]:
    """Return row, name, beginning and end of every slice, in seconds."""
    titles = _titles(records)
    return [
        (titles[r["tid"]], r["name"], r["ts"] / 1e6, (r["ts"] + r["dur"]) / 1e6)
        for r in records
        if r["ph"] == "X"
    ]


def _instants(records: list[Record]) -> list[tuple[str, str, float, Record]]:
    titles = _titles(records)
    return [(titles[r["tid"]], r["name"], r["ts"] / 1e6, r["args"]) for r in records if r["ph"] == "i"]


def _counted(records: list[Record], name: str) -> list[tuple[float, Record]]:
    return [(r["ts"] / 1e6, r["args"]) for r in records if r["ph"] == "C" and r["name"] == name]


def test_a_save_is_a_stall_and_a_row() -> None:
    """The stall is on the training's track, for room and for the copy; the save on another, in four phases."""
    assert _slices(_records(_life())) == [
        ("training thread", "save 7.ckpt", 100, 102),
        ("training thread", "admission", 100, 101),
        ("training thread", "copying", 101, 102),
        ("saves", "7.ckpt", 101, 107),
        ("saves", "staging", 101, 102),
        ("saves", "queued", 102, 103),
        ("saves", "writing", 103, 105),
        ("saves", "committing", 105, 107),
    ]


def test_when_it_became_durable_is_an_instant_with_its_figures() -> None:
    """The instant tells where the file is, its bytes, the stall, and the seconds since the call."""
    [(row, name, at, told)] = _instants(_records(_life()))
    assert (row, name, at) == ("saves", "durable", 107)
    assert told == {
        "url": URL,
        "outcome": "durable",
        "snapshot_bytes": 90,
        "stall_seconds": 2.0,
        "nbytes": 100,
        "parts": 2,
        "seconds": 7.0,
    }


def test_bytes_in_flight_and_pending_saves_are_counted() -> None:
    """A part moves its bytes from "to write" to "written"; at the end there are none, and no save is pending."""
    records = _records(_life())
    assert _counted(records, "saves pending") == [(101, {"saves": 1}), (107, {"saves": 0})]
    assert _counted(records, "bytes in flight") == [
        (101, {"written": 0, "to write": 0}),
        (103, {"written": 0, "to write": 100}),
        (104, {"written": 40, "to write": 60}),
        (105, {"written": 100, "to write": 0}),
        (107, {"written": 0, "to write": 0}),
    ]


def test_a_file_that_is_sent_again_is_counted_again() -> None:
    """Parts of an attempt that failed do not count as written by the next one."""
    life = _life()
    again = [*life[:6], *life[3:]]
    highest = max(values["written"] for _, values in _counted(_records(again), "bytes in flight"))
    assert highest == 100


@pytest.mark.parametrize("end", [Superseded, Cancelled, Abandoned])
def test_a_save_that_did_not_take_effect_says_so(end: type[Event]) -> None:
    """The name of the slice, and an instant, tell how it ended."""
    ended = end(request_id=1, url=URL, time_seconds=104)
    records = _records([*_life()[:2], ended])
    outcome = end.__name__.lower()
    assert ("saves", f"7.ckpt ({outcome})", 101, 104) in _slices(records)
    assert ("saves", "queued", 102, 104) in _slices(records)
    assert [(name, at) for _, name, at, _ in _instants(records)] == [(outcome, 104)]


def test_a_failure_is_shown_with_its_error() -> None:
    """A failed save ends in the phase it failed in, with the error's words."""
    failed = Failed(request_id=1, url=URL, time_seconds=104.5, error=OSError("disk full"))
    records = _records([*_life()[:6], failed])
    assert _slices(records)[-1] == ("saves", "writing", 103, 104.5)
    [(_, name, _, told)] = _instants(records)
    assert (name, told["error"]) == ("failed", "disk full")


def test_a_pending_save_is_cut_off_now() -> None:
    """What has not ended reaches to the moment of writing, and says that it is pending."""
    records = _records(_life()[:4], now=110.0)
    assert ("saves", "7.ckpt (pending)", 101, 110) in _slices(records)
    assert _slices(records)[-1] == ("saves", "writing", 103, 110)
    assert _instants(records) == []


def test_a_base_checkpoint_io_has_no_commit_of_its_own() -> None:
    """Where a base writes, which tells of no bytes, the save is written until it is durable."""
    life = _life()
    records = _records([*life[:3], Durable(request_id=1, url=URL, time_seconds=107, nbytes=0, seconds=7)])
    assert _slices(records)[-1] == ("saves", "writing", 103, 107)
    assert _counted(records, "bytes in flight") == [(101, {"written": 0, "to write": 0})]


def test_removals_and_links_are_instants() -> None:
    """What became of a removal or of a link is told on a track of their own."""
    which: Any = {"url": URL, "time_seconds": 5.0}
    ends = [
        Removed(request_id=1, **which),
        Linked(request_id=2, **which),
        RemovalDropped(request_id=3, **which),
        Failed(request_id=4, **which, error=OSError("no")),
    ]
    assert [(row, name) for row, name, _, _ in _instants(_records(ends))] == [
        ("removals, links", "7.ckpt removed"),
        ("removals, links", "7.ckpt linked"),
        ("removals, links", "7.ckpt dropped"),
        ("removals, links", "7.ckpt failed"),
    ]


def test_what_was_swept_is_told_with_the_save() -> None:
    """The names of what a dead process left are among the save's arguments."""
    life = _life()
    life.insert(3, Swept(request_id=1, url=URL, time_seconds=103, names=("a", "b")))
    assert _instants(_records(life))[0][3]["swept"] == ("a", "b")


def test_saves_at_the_same_time_have_rows_of_their_own() -> None:
    """What overlaps gets another row, and a row that is free again is used again; rows follow their tracks' order."""
    lives = [*_life(1, at=100), *_life(2, at=104), *_life(3, at=107)]
    step = Span("steps", "step 1", 99.0, 101.0)
    records = _records(lives, step)
    rows = [(row, began) for row, name, began, _ in _slices(records) if name == "7.ckpt"]
    assert rows == [("saves", 101), ("saves 2", 105), ("saves", 108)]
    assert list(_titles(records).values()) == ["training thread", "steps", "saves", "saves 2"]
    order = [r["args"]["sort_index"] for r in records if r["name"] == "thread_sort_index"]
    assert order == sorted(order)


_spans = st.builds(
    lambda track, began, length: Span(track, "x", began, began + length),
    st.sampled_from("ab"),
    st.integers(0, 30).map(float),
    st.integers(0, 9).map(float),
)


@given(st.lists(_spans, max_size=30))
def test_no_two_slices_of_a_row_overlap(spans: list[Span]) -> None:
    """Every span is drawn, on a row of its track where nothing else is at that time."""
    slices = _slices(_records([], *spans))
    assert sorted((row[0], began, ended) for row, _, began, ended in slices) == sorted(
        (span.track, span.began_seconds, span.ended_seconds) for span in spans
    )
    for index, (row, _, began, ended) in enumerate(slices):
        others = [(b, e) for other, _, b, e in slices[:index] if other == row]
        assert all(e <= began or b >= ended for b, e in others)


def test_a_save_whose_beginning_is_forgotten_is_not_drawn() -> None:
    """Nothing is guessed: neither slices nor counters."""
    records = _records(_life()[2:])
    assert {record["ph"] for record in records} == {"M"}


def test_a_clock_that_is_set_back_makes_nothing_negative() -> None:
    """A slice that would end before it began has no length, and phases stay within their save."""
    life = _life()
    life[-1] = Durable(request_id=1, url=URL, time_seconds=50, nbytes=100, seconds=7)
    records = _records(life, Span("steps", "step", 9.0, 8.0))
    assert min(r["dur"] for r in records if r["ph"] == "X") == 0
    assert {(began, ended) for row, _, began, ended in _slices(records) if row == "saves"} == {(101, 101)}


def test_times_are_microseconds_since_the_epoch() -> None:
    """So that traces of several processes can be laid together."""
    [step] = [
        r for r in _records([], Span("steps", "s", 1795322243.604742, 1795322243.604744)) if r["ph"] == "X"
    ]
    assert (step["ts"], step["dur"]) == (1795322243604742, 2)
