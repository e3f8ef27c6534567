"""Records a run as a trace: when the loop stalled, which saves were in flight, when they became durable.

Guarantees: recording neither blocks nor locks, so it is safe on the service's loop thread and in signal handlers;
memory is bounded (B2): beyond ``max_events`` the oldest events are dropped. The file is replaced atomically, so it is
whole at any moment; a killed process leaves the last one written.

What does not belong here: what is drawn (trace), Lightning.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from time import time
from types import TracebackType
from typing import Any

from async_ckpt.events import Event, Failed
from async_ckpt.system.permissions import create_private, inherit_metadata
from async_ckpt.system.processes import process_id
from async_ckpt.system.trusted_paths import foreign_link_on
from async_ckpt.telemetry.trace import Span, trace_of

__all__ = ["Timeline"]

logger = logging.getLogger(__name__)


class Timeline:
    """An observer that writes a trace of the run: ``observer=Timeline("trace.json")``.

    The file is written by ``write``, at the end of a ``with`` block, and at the interpreter's exit, after pending saves
    have ended. Several services may share a timeline. If nothing was recorded, nothing is written. A copy, also one in
    another process, starts empty.

    Args:
        path: a file on a local disk, for ui.perfetto.dev or chrome://tracing.
        max_events: how many of the newest events, and of the newest slices, are kept.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_events: int = 100_000) -> None:
        self._path = os.fspath(path)
        self._max_events = max_events
        self._reset()

    def _reset(self) -> None:
        self._pid = process_id()
        self._events: deque[Event] = deque(maxlen=self._max_events)
        # Kept apart, so that a million training steps do not displace the saves.
        self._spans: deque[Span] = deque(maxlen=self._max_events)
        self._unwritten = False

    def __call__(self, event: Event) -> None:
        """Record one event; the service calls this."""
        if isinstance(event, Failed):
            # Only its text: its traceback would keep frames alive, and with them the memory of the snapshot.
            event = replace(event, error=Exception(f"{type(event.error).__name__}: {event.error}"))
        self._leave_to_parent()
        self._events.append(event)
        self._write_later()

    def slice(self, track: str, name: str, began_seconds: float, ended_seconds: float) -> None:
        """Record a slice of your own, such as a training step; from any thread.

        Args:
            track: the track to draw it on; overlapping slices get further rows.
            name: its label.
            began_seconds: when it began, as ``time.time`` counts.
            ended_seconds: when it ended.
        """
        self._leave_to_parent()
        self._spans.append(Span(track, name, began_seconds, ended_seconds))
        self._write_later()

    def write(self) -> None:
        """Write all recorded events, replacing the earlier file; do nothing if nothing is new.

        Raises:
            OSError: the file cannot be written.
        """
        self._leave_to_parent()
        if not self._unwritten:
            return
        self._unwritten = False
        atexit.unregister(self._write_or_log)
        events, spans = (
            self._events.copy(),
            self._spans.copy(),
        )  # in one step each, because other threads append
        trace = trace_of(events, spans, now_seconds=time())
        if self._max_events in (len(events), len(spans)):
            trace["otherData"] = {"kept": f"the newest {self._max_events} events; there may have been more"}
        try:
            _replace(self._path, trace)
        except BaseException:
            self._write_later()
            raise

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.write()
        else:
            self._write_or_log()  # an error in flight is not replaced (E2)

    def __getstate__(self) -> Mapping[str, Any]:
        return {"path": self._path, "max_events": self._max_events}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._path = state["path"]
        self._max_events = state["max_events"]
        self._reset()

    def _write_later(self) -> None:
        """Make sure that the event just recorded will be written; called after recording it, so none is missed."""
        if not self._unwritten:
            self._unwritten = True
            atexit.register(self._write_or_log)  # comes after the service's own hook, which drains (D4)

    def _leave_to_parent(self) -> None:
        """Forget, in a forked child, the events that the parent recorded and will write."""
        if process_id() != self._pid:
            self._reset()

    def _write_or_log(self) -> None:
        try:
            self.write()
        except OSError:
            logger.exception("the timeline was not written to %r", self._path)


def _replace(path: str, trace: dict[str, Any]) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if link := foreign_link_on(folder):
        raise PermissionError(
            errno.EACCES, "another user put this link in a directory that anyone may write to", link
        )
    os.makedirs(folder, exist_ok=True)
    # An unpredictable name: nobody can put a link to another file there beforehand.
    temporary, probe = (os.path.join(folder, f".timeline.{secrets.token_hex(8)}.tmp") for _ in range(2))
    # One event per line, so that the file can be searched and compared.
    encode = json.JSONEncoder(separators=(",", ":")).encode
    lines = ",\n".join(map(encode, trace.pop("traceEvents")))
    descriptor = create_private(temporary)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f'{json.dumps(trace)[:-1]}, "traceEvents": [\n{lines}\n]}}\n')
            inherit_metadata(descriptor, path, probe)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
