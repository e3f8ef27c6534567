"""Submits requests: takes the snapshot, waits for admission or for the turn of a load, and sends the request.

Everything here runs on the caller's thread. Guarantees: if a call raises, nothing was accepted, unless it reports an
*earlier* failure (E1, E2). A call that is interrupted, at any line, either withdraws its request or has submitted it
(D4, L1).

What does not belong here: which request may run (queue), what happens to it (dispatch), how bytes are written
(writers).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic, time
from typing import Any, TypeVar

from async_ckpt.engine import runtime as runtimes
from async_ckpt.engine.queue import LINK, LOAD, QUEUED, REMOVE, SAVE, WAITING, Kind, Op
from async_ckpt.engine.request import Request
from async_ckpt.engine.resources import Resources
from async_ckpt.engine.runtime import Runtime
from async_ckpt.engine.writers import Linker, Writer
from async_ckpt.errors import FlushTimeoutError, ServiceClosedError, StoreError
from async_ckpt.handle import Handle, State
from async_ckpt.snapshot import Capture
from async_ckpt.snapshot.lazy import pass_all
from async_ckpt.stores import check_target, is_local, relocate
from async_ckpt.stores.base import Location
from async_ckpt.stores.removed_directories import with_directory_seen
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Submission"]

T = TypeVar("T")

_TRIES = 8
"""How often a load resolves links that change before its turn."""


class Submission:
    """Submits the requests of one service.

    Args:
        resources: of the service.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self._account = resources.account
        self._failures = resources.account.failures
        self._capturing: list[Request] = []  # saves whose state is being captured

    def save(
        self, state: Any, location: Location, writer: Writer | None, *, share_unpicklable: bool, tell: bool
    ) -> Handle:
        """Take a snapshot of *state* and queue it; see ``CheckpointService.submit``."""
        runtime = self.resources.running()
        location = _as_it_will_be(location, runtime)
        if writer is None:
            if is_local(location) or not self.resources.has_own_stores:
                _check_target(location, runtime, in_place=self.resources.options.in_place == "allow")
            if is_local(location):
                location = with_directory_seen(location)
            writer = self.resources.writer(location)
        request = self._request(SAVE, location, writer)
        try:
            self._capturing.append(request)
            with collector_held_back():
                captured = writer.capture(state, share_unpicklable=share_unpicklable)
            request.op.nbytes = captured.nbytes
            if writer.only_reads:
                self._share_buffer(request, captured, runtime)
            _post(request, runtime)
            self._capturing.remove(request)
            self._await_admission(request)
            self._stage(request, captured, runtime, only_reads=writer.only_reads)
        except BaseException as error:
            with suppress(ValueError):
                self._capturing.remove(request)
            with suppress(ServiceClosedError):
                runtime.post(runtime.dispatcher.withdraw, request)
            if request.rejected and isinstance(error, Exception):  # the service was closed meanwhile
                raise ServiceClosedError("the service was closed meanwhile") from error
            raise
        if tell:
            self._failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    def remove(self, location: Location, writer: Writer | None) -> Handle:
        """Queue a deletion; see ``CheckpointService.submit_removal``."""
        runtime = self.resources.running()
        location = _as_it_will_be(location, runtime)
        writer = self.resources.writer(location) if writer is None else writer
        for request in list(self._capturing):
            if request.op.thread == threading.get_ident():  # this is a signal handler that interrupted it
                runtime.post(runtime.dispatcher.preadmit, request)
        return self._submit(self._request(REMOVE, location, writer), runtime)

    def link(self, location: Location, target: Location) -> Handle:
        """Queue a link; see ``CheckpointService.submit_link``."""
        runtime = self.resources.running()
        location, target = _as_it_will_be(location, runtime), _as_it_will_be(target, runtime)
        linker = Linker(target, self.resources.links, self.resources.workers)
        return self._submit(self._request(LINK, location, linker, target=target.key), runtime)

    def read(self, location: Location, function: Callable[[Location], T]) -> T:
        """Return the result of *function* for *location*, in its turn; see ``CheckpointService.load``.

        *function* is called again if it finds no file because another process changed a link and then removed its old
        target: there was a file behind the link all the time (D2).
        """
        for _ in range(_TRIES):
            with self.turn(location) as here:
                try:
                    return function(here)
                except FileNotFoundError:
                    if _where_it_leads(location) == here:
                        raise
        with self.turn(location) as here:
            return function(here)

    @contextmanager
    def turn(self, location: Location) -> Iterator[Location]:
        """Hold *location* for reading; see ``CheckpointService.turn``."""
        tries = _TRIES if is_local(location) else 1
        for tried in range(1, tries + 1):
            here = _where_it_leads(location)
            with self._turn(here):
                # A pending request, or another process, may have changed a link on the path.
                if tried == tries or _where_it_leads(location) == here:
                    yield here
                    return

    @contextmanager
    def _turn(self, location: Location) -> Iterator[None]:
        pass_all()  # what is loaded is most likely written to the weights
        self._failures.raise_all()
        if runtimes.current() is None:  # nothing is in progress in this process
            yield
            return
        runtime = self.resources.running()
        request = self._request(LOAD, location, None)
        try:
            _post(request, runtime)
            patience = self.resources.patience()
            try:
                patience.wait(request.admission)
            except TimeoutError:
                raise self.resources.timeout_error(patience) from None
            request.admission.result()
            failures = self._failures.claim()
            if not failures:
                yield
        finally:
            with suppress(ServiceClosedError):  # closed while we read: nothing waits for the end of our turn
                runtime.post(runtime.dispatcher.withdraw, request)
        # Otherwise, the content from before a failed save would pass for the new one. Last, as reporting must be (E1).
        self._failures.raise_claimed(failures)

    # -- the steps of a save

    def _share_buffer(self, request: Request, captured: Capture, runtime: Runtime) -> None:
        """Let *request* share the memory of the newest snapshot, if that contains the very same bytes (S1)."""
        newest = self._account.newest
        if newest is None or not captured.resembles(newest[1]):
            return
        if runtime.call(runtime.dispatcher.share_buffer, request, *newest):
            buffer = request.buffer
            if buffer is None or not captured.equals(buffer):
                runtime.post(runtime.dispatcher.unshare_buffer, request)

    def _await_admission(self, request: Request) -> None:
        """Wait for a place in the queue and for memory, within the user's time limits (B2)."""
        patience = self.resources.patience()
        try:
            patience.wait(request.admission)
        except TimeoutError:
            raise FlushTimeoutError(
                f"{request.location.url!r} was not accepted: no room{patience.told}; "
                f"pending: {self.resources.pending_urls()}"
            ) from None
        request.admission.result()

    def _stage(self, request: Request, captured: Capture, runtime: Runtime, *, only_reads: bool) -> None:
        """Take the snapshot and send it to the loop."""
        shares, buffer = request.shares_buffer, request.buffer  # in this order: closing takes both away
        if buffer is None:
            raise ServiceClosedError("the service was closed meanwhile")
        verify = self.resources.options.verify_snapshots
        if shares:
            snapshot = captured.share(buffer, verify=verify)
        else:
            snapshot = captured.stage(buffer, lazy=self._account.lazy, verify=verify)
        if only_reads and not request.rejected:
            self._account.newest = request, snapshot
        request.stall_seconds = monotonic() - request.started_seconds
        request.staged_at_seconds = time()
        request.handle._state = State.STAGED  # here, so that it is true when save returns
        runtime.post(runtime.dispatcher.staged, request, snapshot)
        if not request.claim():
            raise ServiceClosedError("the service was closed meanwhile")

    # -- shared by all requests

    def _submit(self, request: Request, runtime: Runtime) -> Handle:
        _post(request, runtime)
        self._failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    def _request(
        self,
        kind: Kind,
        location: Location,
        writer: Writer | Linker | None,
        *,
        nbytes: int = 0,
        target: str | None = None,
    ) -> Request:
        op = Op(
            id=0,  # the dispatcher assigns it
            lane=self._account.lane,
            kind=kind,
            key=location.key,
            through=location.links if kind is LOAD else (),
            place=location.group,
            phase=WAITING if kind is SAVE else QUEUED,
            thread=threading.get_ident(),
            group=None if writer is None else writer.group,
            nbytes=nbytes,
            target=target,
        )
        return Request(op, self._account, location, writer)


def _post(request: Request, runtime: Runtime) -> None:
    request.handle._would_deadlock = _WouldDeadlock(request.op, runtime)
    runtime.dispatcher.registry.announce(request)
    runtime.post(runtime.dispatcher.enqueue, request)


class _WouldDeadlock:
    """Returns whether waiting for *op* on this thread would never end (L1); one small object per request."""

    __slots__ = ("_op", "_runtime")

    def __init__(self, op: Op, runtime: Runtime) -> None:
        self._op = op
        self._runtime = runtime

    def __call__(self) -> bool:
        with suppress(ServiceClosedError):  # then nothing is in progress
            return self._runtime.call(
                self._runtime.dispatcher.would_deadlock, self._op, threading.get_ident()
            )
        return False


def _as_it_will_be(location: Location, runtime: Runtime) -> Location:
    """Return *location* as it will be once pending requests have ended: they may change links on its path (O1)."""
    known: set[str] = set()
    changes: dict[str, str | None] = {}
    while runtime.dispatcher.registry.announced and (
        new := _names_that_may_lead_on(location, runtime) - known
    ):
        known |= new
        found = runtime.call(runtime.dispatcher.pending_changes, new)
        if found:
            changes.update(found)
            location = relocate(location, changes)
    return location


def _names_that_may_lead_on(location: Location, runtime: Runtime) -> set[str]:
    """Return the links on the path of *location*, and its own name if any link is pending."""
    links_are_made = bool(runtime.dispatcher.registry.announced_links)
    return {*location.links, location.key} if location.follows and links_are_made else set(location.links)


def _where_it_leads(location: Location) -> Location:
    """Return *location* with its links resolved now."""
    if is_local(location):
        with suppress(StoreError):  # a cycle of links, which the reader will report
            return relocate(replace(location, follows=True), {})
    return location


def _check_target(location: Location, runtime: Runtime, *, in_place: bool) -> None:
    """Refuse a location that cannot be saved to, unless a pending request may change that."""
    try:
        check_target(location, in_place=in_place)
    except StoreError:
        if not (is_local(location) and runtime.call(runtime.dispatcher.is_changing, location)):
            raise
