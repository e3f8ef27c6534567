"""How a caller's request comes in: the snapshot, the wait for a place, memory or a turn, and the handing over.

Everything here runs on the caller's thread. Guarantees: where a call raises, nothing was accepted, but for an
*earlier* failure that it tells of (E1, E2); a caller who is interrupted at any line takes its request back, or has
handed it over (D4, L1).

What does not belong here: which request may run (queue), what becomes of it (dispatch), how bytes are written
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
from async_ckpt.engine.resources import Holdings
from async_ckpt.engine.runtime import Runtime
from async_ckpt.engine.writers import Linker, Writer
from async_ckpt.errors import FlushTimeoutError, ServiceClosedError, StoreError
from async_ckpt.handle import Handle, State
from async_ckpt.snapshot import Capture
from async_ckpt.stores import check_target, is_local, relocate
from async_ckpt.stores.base import Location
from async_ckpt.stores.removed_directories import with_directory_seen
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Submission"]

T = TypeVar("T")

_TRIES = 8
"""How often a load looks for the end of links that change before its turn."""


class Submission:
    """Takes the requests of one service in.

    Args:
        holdings: of the service.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        self._account = holdings.account
        self._failures = holdings.account.failures
        self._capturing: list[Request] = []  # saves whose state is being looked at

    def save(
        self, state: Any, location: Location, writer: Writer | None, *, share_unpicklable: bool, tell: bool
    ) -> Handle:
        """Take a snapshot of *state* and queue it; see ``CheckpointService.submit``."""
        runtime = self.holdings.running()
        location = _as_it_will_be(location, runtime)
        if writer is None:
            if is_local(location) or not self.holdings.has_own_stores:
                _check_target(location, runtime, in_place=self.holdings.options.in_place == "allow")
            if is_local(location):
                location = with_directory_seen(location)
            writer = self.holdings.writer(location)
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
            if request.rejected and isinstance(error, Exception):  # closed beneath us, memory and all
                raise ServiceClosedError("the service was closed meanwhile") from error
            raise
        if tell:
            self._failures.raise_unless_in_flight(but=request.handle)
        return request.handle

    def remove(self, location: Location, writer: Writer | None) -> Handle:
        """Queue a deletion; see ``CheckpointService.submit_removal``."""
        runtime = self.holdings.running()
        location = _as_it_will_be(location, runtime)
        writer = self.holdings.writer(location) if writer is None else writer
        for request in list(self._capturing):
            if request.op.thread == threading.get_ident():  # this is a signal handler in the midst of it
                runtime.post(runtime.dispatcher.preadmit, request)
        return self._submit(self._request(REMOVE, location, writer), runtime)

    def link(self, location: Location, target: Location) -> Handle:
        """Queue a link; see ``CheckpointService.submit_link``."""
        runtime = self.holdings.running()
        location, target = _as_it_will_be(location, runtime), _as_it_will_be(target, runtime)
        linker = Linker(target, self.holdings.links, self.holdings.workers)
        return self._submit(self._request(LINK, location, linker, target=target.key), runtime)

    def read(self, location: Location, function: Callable[[Location], T]) -> T:
        """Return what *function* makes of what is to be read at *location*; see ``CheckpointService.load``.

        It is called again where it finds nothing because another process has had a link lead elsewhere, and then
        removed what that had led to: the link led to something all the time (D2).
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
                # What was pending may have changed a link on the way; so may another process, again and again.
                if tried == tries or _where_it_leads(location) == here:
                    yield here
                    return

    @contextmanager
    def _turn(self, location: Location) -> Iterator[None]:
        self._failures.raise_all()
        if runtimes.current() is None:  # nothing is under way in this process
            yield
            return
        runtime = self.holdings.running()
        request = self._request(LOAD, location, None)
        try:
            _post(request, runtime)
            patience = self.holdings.patience()
            try:
                patience.wait(request.admission)
            except TimeoutError:
                raise self.holdings.timeout_error(patience) from None
            request.admission.result()
            failures = self._failures.claim()
            if not failures:
                yield
        finally:
            with suppress(ServiceClosedError):  # closed while we read: nobody waits for the end of our turn
                runtime.post(runtime.dispatcher.withdraw, request)
        # Else the content from before a failed save would pass for the new one. Here, as telling comes last (E1).
        self._failures.raise_claimed(failures)

    # -- the steps of a save

    def _share_buffer(self, request: Request, captured: Capture, runtime: Runtime) -> None:
        """Have *request* hold the memory of the newest snapshot, if that is of the very same bytes (S1)."""
        newest = self._account.newest
        if newest is None or not captured.resembles(newest[1]):
            return
        if runtime.call(runtime.dispatcher.share_buffer, request, *newest):
            buffer = request.buffer
            if buffer is None or not captured.equals(buffer):
                runtime.post(runtime.dispatcher.unshare_buffer, request)

    def _await_admission(self, request: Request) -> None:
        """Wait for a place and memory, as the user's own bounds say, but not for ever (B2)."""
        patience = self.holdings.patience()
        try:
            patience.wait(request.admission)
        except TimeoutError:
            raise FlushTimeoutError(
                f"{request.location.url!r} was not accepted: no room{patience.told}; "
                f"pending: {self.holdings.pending_urls()}"
            ) from None
        request.admission.result()

    def _stage(self, request: Request, captured: Capture, runtime: Runtime, *, only_reads: bool) -> None:
        """Take the snapshot and hand it over."""
        shares, buffer = request.shares_buffer, request.buffer  # in this order: closing takes both away
        if buffer is None:
            raise ServiceClosedError("the service was closed meanwhile")
        snapshot = captured.share(buffer) if shares else captured.stage(buffer)
        if only_reads and not request.rejected:
            self._account.newest = request, snapshot
        request.stall_seconds = monotonic() - request.started_seconds
        request.staged_at_seconds = time()
        request.handle._state = State.STAGED  # here, so that it is true when save returns
        runtime.post(runtime.dispatcher.staged, request, snapshot)
        if not request.claim():
            raise ServiceClosedError("the service was closed meanwhile")

    # -- what they have in common

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
            id=0,  # it gets one where it comes in
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
    """Tells whether waiting for *op* on this thread would last for ever (L1); one small object for each request."""

    __slots__ = ("_op", "_runtime")

    def __init__(self, op: Op, runtime: Runtime) -> None:
        self._op = op
        self._runtime = runtime

    def __call__(self) -> bool:
        with suppress(ServiceClosedError):  # then nothing is under way
            return self._runtime.call(
                self._runtime.dispatcher.would_deadlock, self._op, threading.get_ident()
            )
        return False


def _as_it_will_be(location: Location, runtime: Runtime) -> Location:
    """Return where *location* leads once what is pending has ended: links on its way may be about to change (O1)."""
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
    """Return the links on the way to *location*, and its own name where some link is yet to be made."""
    links_are_made = bool(runtime.dispatcher.registry.announced_links)
    return {*location.links, location.key} if location.follows and links_are_made else set(location.links)


def _where_it_leads(location: Location) -> Location:
    """Return what is read at *location* now."""
    if is_local(location):
        with suppress(StoreError):  # it leads back to itself, as the reader will say
            return relocate(replace(location, follows=True), {})
    return location


def _check_target(location: Location, runtime: Runtime, *, in_place: bool) -> None:
    """Refuse what no save could end in, unless something pending may change that: then it shows at the save's turn."""
    try:
        check_target(location, in_place=in_place)
    except StoreError:
        if not (is_local(location) and runtime.call(runtime.dispatcher.is_changing, location)):
            raise
