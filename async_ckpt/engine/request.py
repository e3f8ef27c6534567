"""The internal record of a request, shared by the caller's thread and the loop thread; the handle is its public side.

Guarantees: only the loop thread ends a request. The caller's thread sets its attributes before it sends the request.

What does not belong here: deciding (queue), carrying out (dispatch).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import anyio

from async_ckpt.engine.failures import Failures
from async_ckpt.engine.queue import LOAD, SAVE, Lane, Op
from async_ckpt.engine.writers import Linker, Writer
from async_ckpt.errors import (
    BackPressureError,
    CancelledSaveError,
    MemoryLimitError,
    NotDurableError,
    QueueFullError,
    SupersededError,
)
from async_ckpt.events import Event, Observer
from async_ckpt.handle import Handle, Outcome, Report
from async_ckpt.snapshot import HostBuffer, HostPool, Snapshot
from async_ckpt.snapshot.lazy import Switch
from async_ckpt.stores.base import Location, Workers
from async_ckpt.telemetry.patience import Progress

__all__ = ["Account", "Admission", "Request"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """One service as the dispatcher knows it.

    Attributes:
        lane: its share of the queue.
        pool: its host memory.
        observer: receives its events.
        failures: those not reported yet.
        copiers: the threads that copy snapshots after the call.
        progress: of its requests.
        closed: whether it accepts nothing more.
        newest: the save that was staged last; another save may share its memory.
        removals: removals and links that may run, and wait for a free task.
        removers: the number of tasks that run those.
        gives_way: whether training goes before the bulk work of its saves.
        lazy: whether its snapshots are copied after the call.
    """

    lane: Lane
    pool: HostPool
    observer: Observer | None
    failures: Failures
    copiers: Workers
    progress: Progress = field(default_factory=Progress)
    closed: bool = False
    newest: tuple[Request, Snapshot] | None = None
    removals: deque[Request] = field(default_factory=deque)
    removers: int = 0
    gives_way: bool = False
    lazy: Switch = field(default_factory=partial(Switch, is_on=False))


class Admission(Outcome[None]):
    """Set when the caller of a save or a load may go on, or is refused."""

    __slots__ = ("_claimed",)

    def __init__(self) -> None:
        super().__init__()
        self._claimed = threading.Lock()  # never waited for: only a flag that one thread can win

    def claim(self) -> bool:
        """Claim the decision about the call; only the first to ask, caller or loop, gets ``True``."""
        return self._claimed.acquire(blocking=False)


class Request:
    """One operation from its arrival to its end. Thousands may be pending, so it is kept small.

    Attributes:
        outcome: its report or its error.
        buffer: the memory of its snapshot; with *shares_buffer*, also that of another save.
        scope: the cancel scope that it runs in.
        rejected: whether the service was closed during the call, which returns no handle.
        abandoned_because: why it was cancelled, if its service was closed.
        staged_at_seconds: since the epoch.
    """

    __slots__ = (
        "_admission",
        "abandoned_because",
        "account",
        "buffer",
        "handle",
        "location",
        "op",
        "outcome",
        "rejected",
        "scope",
        "shares_buffer",
        "snapshot",
        "staged_at_seconds",
        "stall_seconds",
        "started_seconds",
        "writer",
    )

    def __init__(self, op: Op, account: Account, location: Location, writer: Writer | Linker | None) -> None:
        self.op = op
        self.account = account
        self.location = location
        self.writer = writer
        self.outcome: Outcome[Report] = Outcome()
        self.handle = Handle(location.address, self.outcome, shown_url=location.url)
        self._admission = Admission() if op.kind in (SAVE, LOAD) else None
        self.buffer: HostBuffer | None = None
        self.shares_buffer = False
        self.snapshot: Snapshot | None = None
        self.scope: anyio.CancelScope | None = None
        self.rejected = False
        self.abandoned_because = ""
        self.started_seconds = monotonic()
        self.stall_seconds = 0.0
        self.staged_at_seconds = 0.0

    @property
    def admission(self) -> Admission:
        """Set when the caller of a save or a load may go on."""
        assert self._admission is not None, "callers of removals and links do not wait"
        return self._admission

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.outcome.done()

    def claim(self) -> bool:
        """Claim the decision whether the call returns a handle; only the first to ask, caller or loop, gets ``True``.

        The caller asks once it has sent the snapshot; from then on, the handle reports what happens.
        """
        return self.admission.claim()

    def answer(self, refusal: Exception | None = None) -> None:
        """Let its caller go on, or refuse it; callers of removals and links do not wait."""
        if self._admission is None:
            return
        if refusal is None:
            self._admission.set_result(None)
        else:
            self._admission.set_exception(refusal)

    def release_buffer(self) -> None:
        """Release its memory, if it has any."""
        buffer, self.buffer = self.buffer, None
        if buffer is None:
            return
        self.account.pool.release(buffer)
        self.shares_buffer = False
        if self.account.closed:  # nothing else will free it
            self.account.pool.close()

    def emit(self, event: type[Event], **values: Any) -> None:
        """Send an event to the service's observer, whose exceptions are logged."""
        self.account.progress.note()
        observer = self.account.observer
        if observer is None:
            return
        try:
            observer(event(request_id=self.op.id, url=self.location.url, **values))
        except BaseException:  # a SystemExit would end the loop
            with suppress(Exception):  # of the program's own log handlers
                logger.exception("the observer failed on %s of %r", event.__name__, self.location.url)

    def refusal(self, lacking: str) -> BackPressureError:
        """Return the error for a lack of room: in the queue, in memory, or in the system."""
        url, nbytes = self.location.url, self.op.nbytes
        if lacking == "queue":
            return QueueFullError(
                f"{url!r} was not accepted: {self.op.lane.queue_depth} saves are under way; "
                "raise queue_depth, or wait for one of them"
            )
        if lacking == "memory":
            return MemoryLimitError(
                f"{url!r} was not accepted: its snapshot needs {nbytes} bytes beside those held; "
                "raise memory_limit, or wait for a save"
            )
        return MemoryLimitError(
            f"{url!r} was not accepted: no {nbytes} bytes can be had for its snapshot: {lacking}"
        )

    def replacement(self, *, superseded: bool) -> NotDurableError:
        """Return the error of a save that was superseded, or cancelled by a removal, before it started."""
        url = self.location.url
        if superseded:
            return SupersededError(f"a newer save of {url!r} took its place before it had started")
        return CancelledSaveError(f"{url!r} was removed before its save had started")
