"""Where a plugin's saves, loads and removals go: to a service, each waited for or not.

Guarantees: what Lightning reads back without asking is durable when its save returns; outside of a run no thread
stays behind; after ``end``, and after Ctrl-C where the user does not want to wait, the next request begins afresh (L1).

What does not belong here: how Lightning calls a CheckpointIO, and what a base does (plugin).
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

from async_ckpt.engine.writers import Writer
from async_ckpt.errors import FlushTimeoutError, NotDurableError, RankError
from async_ckpt.events import Event, Observer, PartWritten
from async_ckpt.handle import Handle
from async_ckpt.lightning.dircache import forget_changed
from async_ckpt.lightning.flushing import give_up, patiently
from async_ckpt.lightning.group_pending import pending_of_group
from async_ckpt.lightning.prospects import Prospects
from async_ckpt.options import ServiceOptions
from async_ckpt.service import CheckpointService
from async_ckpt.stores import is_local, locate_local
from async_ckpt.stores.base import Location
from async_ckpt.system.processes import process_id
from async_ckpt.telemetry.meter import Meter
from async_ckpt.telemetry.patience import Limit

__all__ = ["Session"]

logger = logging.getLogger(__name__)

# What Lightning reads back without asking the plugin that has written it: the requeued job; the process that has
# spawned the training; all ranks, when a tuner is done; Fabric's XLAFSDPStrategy, which makes one file of many.
_REQUEUE = re.compile(r"(.*[/\\])?hpc_ckpt_\d+\.ckpt")
_BROUGHT_HOME = re.compile(r"(.*[/\\])?\.temp\.ckpt")
_READ_BACK = re.compile(
    r"(.*[/\\])?"
    r"(\.temp\.ckpt|\.(lr_find|scale_batch_size)_[^/\\]*\.ckpt|checkpoint_rank-\d+-of-\d+\.pth)"
)

MakeWriter: TypeAlias = Callable[[CheckpointService], Writer]
"""Makes the writer of one request; where there is none, our own writes."""


class _Announcer:
    """Tells the observers of one session. A service keeps it, and it knows neither: they are dropped together."""

    def __init__(self, observer: Observer | None) -> None:
        self.observers: list[Observer] = []
        self._own = observer
        self.begin_afresh()

    def begin_afresh(self) -> None:
        self.meter = Meter()
        self.addresses: dict[str, str] = {}  # by what is shown of them, where that is not all

    def address_of(self, url: str) -> str:
        return self.addresses.get(url, url)

    def __call__(self, event: Event) -> None:
        # ModelCheckpoint asks fsspec what is there, and fsspec remembers
        forget_changed(event, self.address_of(event.url))
        self.meter(event)
        if isinstance(event, PartWritten) and (group := pending_of_group()) is not None:
            group.beat()
        for observer in (*self.observers, self._own):
            if observer is not None:
                observer(event)


class Session:
    """The requests of one plugin.

    Args:
        options: of the service.

    Attributes:
        synchronous: whether a save or a removal returns only once it has ended, and leaves no thread.
        is_direct: tells whether the save that is asked for now returns only once it is durable, while a run goes on.
        has_ended: whether the last ``end`` came to its end.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.synchronous = False
        self.is_direct: Callable[[], bool] = _never
        self._options = options
        ServiceOptions(observer=options.get("observer"))  # refuse it here: the service sees only ours
        self._announcer = _Announcer(options.get("observer"))
        self._service = self._new_service()  # here, as a signal handler may come where one is made on demand
        self.has_ended = True
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._pid = process_id()
        self._announcer.begin_afresh()
        self._prospects = Prospects()
        self._under_way: set[object] = set()
        self._is_late = False

    def _leave_to_parent(self) -> None:
        """In a forked child, know nothing of what the parent has pending (L1)."""
        if process_id() != self._pid:
            self._begin_afresh()

    @property
    def meter(self) -> Meter:
        """How far the saves are."""
        self._leave_to_parent()
        return self._announcer.meter

    @property
    def service(self) -> CheckpointService:
        """The service; a new one after each end."""
        self._leave_to_parent()
        return self._service

    def _new_service(self) -> CheckpointService:
        """Make a service, which has no thread before its first request."""
        service = CheckpointService(**{**self._options, "observer": self._announcer})
        service.known_as = "AsyncCheckpointIO: call its teardown()"
        service.failures.keep_ambient_error()  # Lightning saves while it handles training's error, too
        return service

    @property
    def is_used(self) -> bool:
        """Whether there is something for ``end`` to free."""
        return self._service.is_running

    def observe(self, observer: Observer) -> None:
        """Tell *observer* of every event from now on; again does nothing."""
        if observer not in self._announcer.observers:
            self._announcer.observers.append(observer)

    def disregard(self, observer: Observer) -> None:
        """Tell *observer* no more."""
        if observer in self._announcer.observers:
            self._announcer.observers.remove(observer)

    def save(self, checkpoint: Any, place: Location, make_writer: MakeWriter | None) -> None:
        """Have *checkpoint* written; wait for that where nobody else would."""
        requeue = _REQUEUE.fullmatch(place.url) is not None
        rests = requeue or self._is_synchronous(place)
        waits = rests or self.is_direct()
        with self._at_rest_after(rests=rests):  # first: a signal handler may come from here on
            service = self.service
            writer = None if make_writer is None else make_writer(service)
            self._remember_address(place)
            self._is_late = False
            # A job is requeued whatever became of an earlier checkpoint; who tears down is told of it.
            submit = partial(
                service.submit, checkpoint, place, writer, share_unpicklable=writer is not None, tell=False
            )
            handle = self._request(place, submit, there=True)
            given_up = waits and not self._wait_for_one(service, handle)
            if not given_up and not requeue:
                service.failures.raise_unless_in_flight(but=handle)

    def remove(self, place: Location, make_writer: MakeWriter | None) -> None:
        """Have what is there deleted; wait for that where nobody else would."""
        waits = self._is_synchronous(place)
        with self._at_rest_after(rests=waits):
            service = self.service
            writer = None if make_writer is None else make_writer(service)
            self._remember_address(place)
            handle = self._request(place, partial(service.submit_removal, place, writer), there=False)
            # A directory is no checkpoint of ours. Who has it removed may be about to put a file in its place.
            foreign = writer is None and is_local(place) and os.path.isdir(place.path)
            if foreign or waits:
                # It may have been dropped because of another's failure, as the log says.
                with suppress(NotDurableError):
                    self._wait_for_one(service, handle)

    def link(self, place: Location, target: Location, *, waits: bool) -> None:
        """Have *place* lead to *target* once that is durable; wait for that, if asked to."""
        if place.key != target.key:  # else it is that file already, by another spelling
            service = self.service
            submit = partial(service.submit_link, place, target)
            handle = self._request(place, submit, there=True, target=target)
            if waits:
                self._wait_for_one(service, handle)

    @contextmanager
    def loading(self, place: Location) -> Iterator[CheckpointService]:
        """Lend the service for a load from *place*, once what other ranks have pending there has ended."""
        if _BROUGHT_HOME.fullmatch(place.url):  # others have trained; nobody tears down here
            self.synchronous = True
        with self._at_rest_after(rests=True):  # Fabric loads, and never tears down
            service = self.service
            group = pending_of_group()
            if group is not None:
                limit = service.options.limit(None)
                group.wait_for(place.key, place.url, limit=limit)
                if is_local(place) and os.path.islink(place.path):  # by now, where it will lead
                    group.wait_for(locate_local(place.path).key, place.url, limit=limit)
            yield service

    def will_exist(self, place: Location, leaves: Callable[[str], bool]) -> bool | None:
        """See ``Prospects.will_exist``."""
        self._leave_to_parent()
        return self._prospects.will_exist(place, leaves)

    def address_of(self, url: str) -> str:
        """Return what the user has written for the location that an event names."""
        return self._announcer.address_of(url)

    def wait(self, timeout: float | None) -> None:
        """Wait for everything, also of other ranks, and raise what failed here."""
        service = self.service
        left = self._wait(service, limit=timeout)
        service.wait(left)
        _wait_for_other_ranks(service.options.limit(None if timeout is None else left))

    def see_ended(self, urls: Collection[str]) -> None:
        """Wait for what is pending at *urls*; what fails there is raised where it would have been."""
        service = self.service
        for handle in service.pending:
            if handle.shown_url in urls and self._service is service:
                self._wait(service, handle)

    def settle(self) -> None:
        """Like ``flush``, for callers that may be handling an error, which is not replaced (E2)."""
        service = self._service
        left = self._wait(service)
        service.settle(left)
        _wait_for_other_ranks(service.options.limit(None), in_flight=sys.exc_info()[1])

    def end(self) -> None:
        """See everything to its end, also of other ranks, and free the service.

        Where Ctrl-C comes while this waits, what is pending goes on, and Lightning comes again.
        """
        self.has_ended = False
        service = self._service
        left = self._wait(service)
        self._service = self._new_service()
        self.has_ended = True
        service.close(left)
        _wait_for_other_ranks(service.options.limit(None), in_flight=sys.exc_info()[1])

    def _wait(
        self, service: CheckpointService, handle: Handle | None = None, *, limit: float | None = None
    ) -> float:
        """Wait for *handle*, or for everything; return how long the caller may go on waiting.

        Where the user does not want to wait any longer, everything is given up; the next save begins afresh. Where
        ``flush_timeout`` has passed once, nobody waits for as long again until something new is saved.
        """
        timeout = 0.0 if limit is None and self._is_late else limit
        left = patiently(service, self.meter, timeout=timeout, handle=handle)
        if left is None:
            self._service = self._new_service()
            give_up(service)
        elif left == 0.0 and handle is None and limit is None:
            self._is_late = True
        return left or 0.0

    def _wait_for_one(self, service: CheckpointService, handle: Handle) -> bool:
        """Wait for *handle* and raise what failed; return whether it was waited for to the end."""
        left = self._wait(service, handle)
        given_up = self._service is not service
        if not given_up:
            handle.wait(left)
        return not given_up

    def _is_synchronous(self, place: Location) -> bool:
        return self.synchronous or _READ_BACK.fullmatch(place.url) is not None

    @contextmanager
    def _at_rest_after(self, *, rests: bool) -> Iterator[None]:
        """Keep no thread after an operation that *rests*: nothing may follow it, and outside of a run no teardown."""
        operation = object()
        self._leave_to_parent()
        self._under_way.add(operation)
        try:
            yield
        finally:
            self._under_way.discard(operation)
            # Not beneath another one, which a signal handler may have interrupted.
            if rests and not self._under_way:
                self._service.rest()

    def _remember_address(self, place: Location) -> None:
        """Take down, before there are events of it, what a location is that they do not name in full."""
        if place.address != place.url:
            self._announcer.addresses[place.url] = place.address

    def _request(
        self, place: Location, submit: Callable[[], Handle], *, there: bool, target: Location | None = None
    ) -> Handle:
        """Make a request that is known of, also to other ranks."""
        group = pending_of_group()
        if group is None:
            handle = submit()
            self._prospects.add(place, handle, there=there, target=target)
            return handle
        announcement = group.announce(place.key)
        raises = self._service.options.on_error == "raise"
        try:
            handle = submit()
            self._prospects.add(place, handle, there=there, target=target)
            handle.add_done_callback(lambda ended: announcement.end(_failure_of(ended) if raises else None))
        except BaseException:  # they must not wait for what may never be
            announcement.end()
            raise
        return handle


def _never() -> bool:
    return False


def _wait_for_other_ranks(limit: Limit, in_flight: BaseException | None = None) -> None:
    """Wait for what they have pending; an error that is *in_flight* is not replaced (E2).

    With one, too: when this process ends with it, a launcher may end the one that writes.
    """
    group = pending_of_group()
    if group is None:
        return
    group.store.finish()
    try:
        group.wait_for_all(limit=limit)
    except (RankError, FlushTimeoutError) as error:
        if in_flight is None:
            raise
        logger.error("%s", error)


def _failure_of(handle: Handle) -> str | None:
    """Return what other ranks are told of a request that has ended."""
    failure = handle._failure
    return None if failure is None else f"{type(failure.error).__name__}: {failure.error}"
