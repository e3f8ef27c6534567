"""One request as the service and the loop thread know it together, and what its caller is told where it has no effect.

Guarantees: the loop thread alone ends a request; what the caller's thread sets, it sets before it hands the request
over. The handle is its public half.

What does not belong here: deciding (queue), carrying out (dispatch).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
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
from async_ckpt.stores.base import Location
from async_ckpt.telemetry.patience import Progress

__all__ = ["Account", "Admission", "Request"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """One service as the dispatcher knows it.

    Attributes:
        lane: its share of the queue.
        pool: its host memory.
        observer: whom it tells of events.
        failures: what it has not told yet.
        progress: of its requests.
        closed: whether it lets nothing more in.
        newest: the save that was staged last; its memory may serve another save.
        removals: removals and links that may run, and wait for a task that is free.
        removers: how many tasks carry those out.
        gives_way: whether training goes before the bulk work of its saves.
    """

    lane: Lane
    pool: HostPool
    observer: Observer | None
    failures: Failures
    progress: Progress = field(default_factory=Progress)
    closed: bool = False
    newest: tuple[Request, Snapshot] | None = None
    removals: deque[Request] = field(default_factory=deque)
    removers: int = 0
    gives_way: bool = False


class Admission(Outcome[None]):
    """Set when the caller of a save or a load may go on, or is refused."""

    __slots__ = ("_claimed",)

    def __init__(self) -> None:
        super().__init__()
        self._claimed = threading.Lock()  # never waited for: only a flag that one thread can win

    def claim(self) -> bool:
        """Decide what becomes of the call; only the first, caller or loop, does and gets ``True``."""
        return self._claimed.acquire(blocking=False)


class Request:
    """One operation from its arrival to its end. Thousands may be pending, so it is kept small.

    Attributes:
        outcome: what it came to.
        buffer: the memory of its snapshot; another save's as well where it *shares_buffer*.
        scope: of what runs it.
        rejected: the service was closed beneath the caller, who returns no handle.
        abandoned_because: why it runs no longer, where its service has been closed.
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
        """What the caller of a save or a load waits for before it goes on."""
        assert self._admission is not None, "nobody waits where a removal or a link is accepted"
        return self._admission

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.outcome.done()

    def claim(self) -> bool:
        """Decide whether its caller returns a handle; only the first, caller or loop, does and gets ``True``.

        The caller does so when it has handed the snapshot over: whatever becomes of that, the handle tells.
        """
        return self.admission.claim()

    def answer(self, refusal: Exception | None = None) -> None:
        """Tell its caller that it may go on, or why not; who asks for a removal or a link does not wait for that."""
        if self._admission is None:
            return
        if refusal is None:
            self._admission.set_result(None)
        else:
            self._admission.set_exception(refusal)

    def release_buffer(self) -> None:
        """Give its memory back, if it has any."""
        buffer, self.buffer = self.buffer, None
        if buffer is None:
            return
        self.account.pool.release(buffer)
        self.shares_buffer = False
        if self.account.closed:  # nobody else will look after it
            self.account.pool.close()

    def emit(self, event: type[Event], **values: Any) -> None:
        """Tell the service's observer; what it raises goes no further."""
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
        """Return why there is no room for it: in the queue, in memory, or as the system says."""
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
        """Return what took its place before it had started."""
        url = self.location.url
        if superseded:
            return SupersededError(f"a newer save of {url!r} took its place before it had started")
        return CancelledSaveError(f"{url!r} was removed before its save had started")
