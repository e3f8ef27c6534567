"""Makes a trace of events, as values: the JSON Object Format of Chrome's "Trace Event Format".

Guarantees: pure; slices within a row do not overlap, as the format demands of complete events: overlapping slices get
rows of their own. Times are whole microseconds since the epoch, so traces of several processes can be merged.

The format is described in the Chromium project's document of that name; ui.perfetto.dev and chrome://tracing open it.
What does not belong here: recording events, writing files (timeline).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from async_ckpt.events import (
    Abandoned,
    Accepted,
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

__all__ = ["Span", "trace_of"]

TRAINING = "training thread"
SAVES = "saves"
FILES = "removals, links"

_ORDER = {TRAINING: 0, SAVES: 2, FILES: 3}  # other tracks between
_ENDS = (Durable, Failed, Superseded, Cancelled, Abandoned)
_DONE = {Removed: "removed", Linked: "linked", RemovalDropped: "dropped", Failed: "failed"}
_PHASES = {Accepted: "staging", Staged: "queued", Writing: "writing", Committing: "committing"}


class Span(NamedTuple):
    """A named interval on a track, in seconds since the epoch."""

    track: str
    name: str
    began_seconds: float
    ended_seconds: float


def trace_of(events: Iterable[Event], spans: Iterable[Span] = (), *, now_seconds: float) -> dict[str, Any]:
    """Return the trace, ready for ``json``.

    Args:
        events: the events of any number of services, in order.
        spans: further slices.
        now_seconds: the end of the slices of pending saves.
    """
    events = list(events)
    lives: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        lives[event.request_id].append(event)
    boxes = [box for life in lives.values() for box in _drawn(life, _microseconds(now_seconds))]
    for span in spans:
        box = _Box(span.track, _microseconds(span.began_seconds), _microseconds(span.ended_seconds))
        box.add(span.name, box.began, box.ended)
        boxes.append(box)
    return {"displayTimeUnit": "ms", "traceEvents": [*_placed(boxes), *_counters(events)]}


@dataclass(slots=True, eq=False)
class _Box:
    """A slice with everything drawn in it, or an instant; occupies a row of a track."""

    track: str
    began: int
    ended: int
    records: list[dict[str, Any]] = field(default_factory=list)
    row: int = 0

    def __post_init__(self) -> None:
        self.ended = max(self.began, self.ended)  # the clock was set back meanwhile

    def add(self, name: str, began: int, ended: int, **args: Any) -> None:
        """Draw a slice within the box."""
        began = min(max(began, self.began), self.ended)
        ended = min(max(began, ended), self.ended)
        self.records.append({"ph": "X", "name": name, "ts": began, "dur": ended - began, "args": args})

    def mark(self, name: str, **args: Any) -> None:
        """Draw an instant at the end."""
        self.records.append({"ph": "i", "s": "t", "name": name, "ts": self.ended, "args": args})


def _drawn(life: list[Event], now: int) -> Iterator[_Box]:
    """Draw one request; nothing for a save whose first events were dropped."""
    first = life[0]
    if isinstance(first, Accepted):
        yield _drawn_save(life, now)
        yield from (_drawn_stall(event, first) for event in life if isinstance(event, Staged))
    elif type(first) in _DONE:
        box = _Box(FILES, _time_of(first), _time_of(first))
        box.mark(f"{_name(first.url)} {_DONE[type(first)]}", url=first.url, **_arguments_of(life))
        yield box


def _drawn_save(life: list[Event], now: int) -> _Box:
    url = life[0].url
    end = next((event for event in life if isinstance(event, _ENDS)), None)
    box = _Box(SAVES, _time_of(life[0]), now if end is None else _time_of(end))
    outcome = "pending" if end is None else type(end).__name__.lower()
    told = {"url": url, "outcome": outcome, **_arguments_of(life)}
    title = _name(url) if outcome == "durable" else f"{_name(url)} ({outcome})"
    box.add(title, box.began, box.ended, **told)
    phases = [(_PHASES[type(event)], _time_of(event)) for event in life if type(event) in _PHASES]
    for (phase, began), (_, ended) in pairwise([*phases, ("", box.ended)]):
        box.add(phase, began, ended)
    if end is not None:
        box.mark(outcome, **told)
    return box


def _drawn_stall(staged: Staged, accepted: Accepted) -> _Box:
    """Draw how long ``save`` blocked its caller; until it was accepted, it captured the state and waited for room."""
    called = _microseconds(staged.time_seconds - staged.stall_seconds)
    box = _Box(TRAINING, called, _time_of(staged))
    box.add(f"save {_name(staged.url)}", called, box.ended, **_arguments_of([accepted, staged]))
    box.add("admission", called, _time_of(accepted))
    box.add("copying", _time_of(accepted), box.ended)
    return box


def _arguments_of(life: Iterable[Event]) -> dict[str, Any]:
    """Return the attributes of one request's events, besides their times."""
    told: dict[str, Any] = {}
    for event in life:
        match event:
            case Accepted():
                told["snapshot_bytes"] = event.nbytes
            case Staged():
                told["stall_seconds"] = event.stall_seconds
            case Swept():
                told["swept"] = event.names
            case LaidOut():
                told |= {"nbytes": event.nbytes, "parts": event.parts}
            case Durable():
                told |= {"nbytes": event.nbytes, "seconds": event.seconds}
            case Failed():
                told["error"] = str(event.error)
    return told


def _placed(boxes: list[_Box]) -> Iterator[dict[str, Any]]:
    """Give every box the first row of its track that is free at its time."""
    boxes.sort(key=lambda box: box.began)
    ends: dict[str, list[int]] = defaultdict(list)
    for box in boxes:
        rows = ends[box.track]
        box.row = next((row for row, end in enumerate(rows) if end <= box.began), len(rows))
        rows[box.row : box.row + 1] = [box.ended]
    tracks = sorted(ends, key=lambda track: _ORDER.get(track, 1))
    places = [(track, row) for track in tracks for row in range(len(ends[track]))]
    tids = {place: tid for tid, place in enumerate(places, start=1)}
    yield _record("M", name="process_name", args={"name": "async_ckpt"})
    for (track, row), tid in tids.items():
        title = f"{track} {row + 1}" if row else track
        yield _record("M", tid=tid, name="thread_name", args={"name": title})
        yield _record("M", tid=tid, name="thread_sort_index", args={"sort_index": tid})
    for box in boxes:
        for record in box.records:
            yield _record(**record, tid=tids[box.track, box.row])


def _counters(events: list[Event]) -> Iterator[dict[str, Any]]:
    """Draw the number of pending saves, and the bytes that are being written."""
    lengths: dict[int, int] = {}  # of pending saves; 0 where it is not known yet, or never
    written: dict[int, int] = {}
    before: dict[str, dict[str, int]] = {}
    for event in events:
        key = event.request_id
        if isinstance(event, Accepted):
            lengths[key], written[key] = 0, 0
        elif key not in lengths:
            continue
        elif isinstance(event, LaidOut):
            lengths[key], written[key] = event.nbytes, 0  # even if the whole file is sent again
        elif isinstance(event, PartWritten):
            written[key] += event.nbytes
        elif isinstance(event, _ENDS):
            del lengths[key], written[key]
        done = sum(written.values())
        now = {
            "saves pending": {"saves": len(lengths)},
            "bytes in flight": {"written": done, "to write": sum(lengths.values()) - done},
        }
        for name, values in now.items():
            if before.get(name) != values:
                yield _record("C", name=name, ts=_time_of(event), args=values)
        before = now


def _record(ph: str, **values: Any) -> dict[str, Any]:
    return {"ph": ph, "pid": os.getpid(), **values}


def _name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2] or url


def _time_of(event: Event) -> int:
    return _microseconds(event.time_seconds)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
