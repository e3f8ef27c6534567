"""The session of a plugin: passes its saves, loads and removals to a service, and decides which of them to wait for.

Guarantees: files that Lightning reads back past the plugin are durable when their save returns; outside of a run no
thread is left; after ``end``, and after a Ctrl-C that ends the waiting, the next request gets a new service (L1).

What does not belong here: the interface of a CheckpointIO, and calling a base (plugin).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

from async_ckpt.engine.writers import Writer
from async_ckpt.errors import NotDurableError
from async_ckpt.events import Observer
from async_ckpt.handle import Handle
from async_ckpt.lightning.event_relay import EventRelay
from async_ckpt.lightning.flushing import give_up, wait_with_progress
from async_ckpt.lightning.group_pending import pending_of_group, wait_for_other_ranks
from async_ckpt.lightning.pending_files import PendingFiles
from async_ckpt.lightning.read_back import is_for_requeue, is_of_spawned_process, is_read_back
from async_ckpt.lightning.shared_failures import (
    KnownFailures,
    SharedFailures,
    failed_here,
    failed_on_this_rank,
)
from async_ckpt.options import ServiceOptions
from async_ckpt.service import CheckpointService
from async_ckpt.stores import is_local, locate_local
from async_ckpt.stores.base import MARKER, Location
from async_ckpt.system.processes import process_id
from async_ckpt.telemetry.meter import Meter

__all__ = ["Session"]

MakeWriter: TypeAlias = Callable[[CheckpointService], Writer]
"""Makes the writer of one request; ``None`` stands for our own writer."""


class Session:
    """The requests of one plugin.

    Args:
        options: the options of the service.

    Attributes:
        synchronous: whether saves and removals return only once they have ended, and leave no thread.
        is_direct: returns whether the current save returns only once it is durable, though a run goes on.
        has_ended: whether the last ``end`` was completed.
        shared_failures: of the saves that all ranks make together.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.synchronous = False
        self.is_direct: Callable[[], bool] = _never
        self._options = options
        ServiceOptions(observer=options.get("observer"))  # validate it here: the service is given ours
        self._relay = EventRelay(options.get("observer"))
        self._service = (
            self._new_service()
        )  # here, because a signal handler may come while one is made on demand
        self.has_ended = True
        self._reset()

    def _reset(self) -> None:
        self._pid = process_id()
        self._relay.reset()
        self._pending_files = PendingFiles()
        self.shared_failures = SharedFailures()
        self._under_way: set[object] = set()
        self._is_late = False

    def _leave_to_parent(self) -> None:
        """In a forked child, forget the parent's pending requests (L1)."""
        if process_id() != self._pid:
            self._reset()

    @property
    def meter(self) -> Meter:
        """The progress of the saves."""
        self._leave_to_parent()
        return self._relay.meter

    @property
    def service(self) -> CheckpointService:
        """The service; a new one after each ``end``."""
        self._leave_to_parent()
        return self._service

    def _new_service(self) -> CheckpointService:
        """Make a service; it starts no thread before its first request."""
        service = CheckpointService(**{**self._options, "observer": self._relay})
        service.known_as = "AsyncCheckpointIO: call its teardown()"
        service.failures.keep_ambient_error()  # Lightning saves while it handles training's error, too
        return service

    @property
    def is_used(self) -> bool:
        """Whether ``end`` has anything to free."""
        return self._service.is_running

    def observe(self, observer: Observer) -> None:
        """Pass every event to *observer* from now on; calling it again does nothing."""
        if observer not in self._relay.observers:
            self._relay.observers.append(observer)

    def disregard(self, observer: Observer) -> None:
        """Pass no more events to *observer*."""
        if observer in self._relay.observers:
            self._relay.observers.remove(observer)

    def save(self, checkpoint: Any, location: Location, make_writer: MakeWriter | None) -> None:
        """Save *checkpoint*; wait for it if no later call would."""
        requeue = is_for_requeue(location.url)
        frees = requeue or self._is_synchronous(location.url)
        waits = frees or self.is_direct()
        with self._freeing_after(frees=frees):  # first: a signal handler may come from here on
            service = self.service
            writer = None if make_writer is None else make_writer(service)
            self._remember_address(location)
            self._is_late = False
            # A job is requeued even if an earlier checkpoint failed; teardown reports that failure.
            submit = partial(
                service.submit, checkpoint, location, writer, share_unpicklable=writer is not None, tell=False
            )
            handle = self._request(location, submit, exists=True)
            given_up = waits and not self._wait_for_one(service, handle)
            if not given_up and not requeue:
                service.failures.raise_unless_in_flight(but=handle)

    def save_sharded(
        self,
        state: Mapping[str, Any],
        path: str,
        locate: Callable[[], Location],
        extras: Mapping[str, Any],
        *,
        known: KnownFailures | None,
    ) -> None:
        """Write this rank's part of *state*; wait for the verdict if no later call would.

        A failure on this rank alone fails the save on all ranks, and is raised at a later call: the others are about to
        wait for this rank in a collective operation.

        Args:
            state: this rank's part.
            path: the path of the directory.
            locate: returns its location.
            extras: see ``CheckpointService.submit_sharded``; only the first rank has any.
            known: the `known_failures` of the first rank before this save; ``None`` if there are none.
        """

        def submit(service: CheckpointService) -> Handle:
            try:
                location = locate()
            except Exception as error:  # perhaps a package is missing on this rank
                service.refuse_sharded(error)
                return self._failed_save(service, path, error)
            self._remember_address(location)
            if (
                extras
                and is_local(location)
                and (os.path.islink(location.path) or os.path.isfile(location.path))
            ):
                self._make_way(service, location)
            try:
                handle, _ = service.submit_sharded(state, location, extras=extras, tell=False)
            except Exception as error:  # the other ranks have been told
                return self._failed_save(service, location, error)
            # Not announced to other ranks: each has a request of its own, with the same outcome.
            self._pending_files.add(location, handle, exists=True)
            self.shared_failures.add(handle)
            return handle

        self._save_together(path, submit, known=known)

    def _failed_save(self, service: CheckpointService, place: Location | str, error: Exception) -> Handle:
        handle = failed_on_this_rank(service, place, error)
        self.shared_failures.add(handle)
        return handle

    def save_once(
        self,
        state: Any,
        path: str,
        locate: Callable[[], Location],
        *,
        is_first: bool,
        known: KnownFailures | None,
    ) -> None:
        """Write *state* to a file, on the first rank; every rank calls this.

        Args:
            state: the state of all ranks; only the first rank's is used.
            path: the path of the file.
            locate: returns its location; called on the first rank only.
            is_first: whether this is the first rank.
            known: as for `save_sharded`.
        """

        def submit(service: CheckpointService) -> Handle:
            try:
                location = locate()
            except Exception as error:
                return failed_here(service, path, error)
            self._remember_address(location)
            if is_local(location) and os.path.isfile(
                location.below(MARKER).path
            ):  # a sharded checkpoint; Fabric deletes it, too
                self._make_way(service, location)
            accept = partial(service.submit, state, location, tell=False)
            try:
                return self._request(location, accept, exists=True)
            except Exception as error:
                return failed_here(service, location, error)

        self._save_together(path, submit if is_first else None, known=known)

    def _save_together(
        self, path: str, submit: Callable[[CheckpointService], Handle] | None, *, known: KnownFailures | None
    ) -> None:
        """Make a save of every rank, and raise the *known* failures of the first rank on all of them."""
        requeue = is_for_requeue(path)
        frees = requeue or self._is_synchronous(path)
        waits = frees or self.is_direct()
        with self._freeing_after(frees=frees):
            service = self.service
            self._is_late = False
            handle = None if submit is None else submit(service)
            given_up = waits and handle is not None and not self._wait_for_one(service, handle)
            if not given_up and not requeue and known:
                for earlier in self.shared_failures.handles_up_to(known):
                    self._wait(service, earlier)
                service.failures.raise_unless_in_flight(but=handle)
                if service.options.on_error == "raise":
                    self.shared_failures.raise_others(known)

    def known_failures(self) -> KnownFailures | None:
        """Return the failures that this rank, the first one, will raise at its next save."""
        unreported = self.service.failures.unreported()
        return self.shared_failures.unreported(
            "; ".join(f"{type(each).__name__}: {each}" for each in unreported)
        )

    def _make_way(self, service: CheckpointService, location: Location) -> None:
        """Delete what is at the location of a save; called on the first rank, before the save."""
        if not service.failures:  # otherwise the removal would be dropped (D3)
            try:
                service.submit_removal(location)
            except Exception as error:  # an earlier failure, which other ranks may not know yet
                failed_here(service, location, error)

    def remove(self, location: Location, make_writer: MakeWriter | None, *, is_sharded: bool = False) -> None:
        """Delete the checkpoint; wait for it if no later call would.

        Args:
            location: of the checkpoint.
            make_writer: makes the writer that deletes it.
            is_sharded: whether a directory is a checkpoint of ours.
        """
        waits = self._is_synchronous(location.url)
        with self._freeing_after(frees=waits):
            service = self.service
            writer = None if make_writer is None else make_writer(service)
            self._remember_address(location)
            handle = self._request(location, partial(service.submit_removal, location, writer), exists=False)
            # Another directory is not a checkpoint of ours. The caller may be about to replace it by a file.
            foreign = (
                not is_sharded and writer is None and is_local(location) and os.path.isdir(location.path)
            )
            if foreign or waits:
                # Another request's failure may have dropped it; the log says so.
                with suppress(NotDurableError):
                    self._wait_for_one(service, handle)

    def link(self, location: Location, target: Location, *, waits: bool) -> None:
        """Make *location* a link to *target* once *target* is durable; wait for the link if *waits*."""
        if location.key != target.key:  # otherwise both are the same file
            service = self.service
            submit = partial(service.submit_link, location, target)
            handle = self._request(location, submit, exists=True, target=target)
            if waits:
                self._wait_for_one(service, handle)

    @contextmanager
    def loading(self, location: Location) -> Iterator[CheckpointService]:
        """Yield the service for a load from *location*, once other ranks' pending requests for it have ended."""
        if is_of_spawned_process(location.url):  # others have trained; nobody tears down here
            self.synchronous = True
        with self._freeing_after(frees=True):  # Fabric loads, and never tears down
            service = self.service
            group = pending_of_group()
            if group is not None:
                limit = service.options.limit(None)
                group.wait_for(location.key, location.url, limit=limit)
                if is_local(location) and os.path.islink(
                    location.path
                ):  # by now, it leads where it will lead in the end
                    group.wait_for(locate_local(location.path).key, location.url, limit=limit)
            yield service

    def will_exist(self, location: Location, leaves: Callable[[str], bool]) -> bool | None:
        """Like ``PendingFiles.will_exist``."""
        self._leave_to_parent()
        return self._pending_files.will_exist(location, leaves)

    def address_of(self, url: str) -> str:
        """Return the full address of the location that an event names."""
        return self._relay.address_of(url)

    def wait(self, timeout: float | None) -> None:
        """Wait for all requests, also those of other ranks, and raise this rank's failures."""
        service = self.service
        left = self._wait(service, limit=timeout)
        service.wait(left)
        wait_for_other_ranks(service.options.limit(None if timeout is None else left))

    def see_ended(self, urls: Collection[str]) -> None:
        """Wait until the pending requests of *urls* have ended; their failures are raised at a later call, as usual."""
        service = self.service
        for handle in service.pending:
            if handle.shown_url in urls and self._service is service:
                self._wait(service, handle)

    def settle(self) -> None:
        """Like ``wait``, for callers that may be handling an error, which is not replaced (E2)."""
        service = self._service
        left = self._wait(service)
        service.settle(left)
        wait_for_other_ranks(service.options.limit(None), in_flight=sys.exc_info()[1])

    def end(self) -> None:
        """Wait for all requests, also those of other ranks, and free the service.

        If Ctrl-C interrupts the wait, pending requests go on, and Lightning calls this again.
        """
        self.has_ended = False
        service = self._service
        left = self._wait(service)
        self._service = self._new_service()
        self.has_ended = True
        service.close(left)
        wait_for_other_ranks(service.options.limit(None), in_flight=sys.exc_info()[1])

    def _wait(
        self, service: CheckpointService, handle: Handle | None = None, *, limit: float | None = None
    ) -> float:
        """Wait for *handle*, or for all requests; return how long the caller may go on waiting.

        If the user interrupts the wait, everything is given up, and the next save gets a new service. Once
        ``flush_timeout`` has passed, later waits return at once until there is a new save.
        """
        timeout = 0.0 if limit is None and self._is_late else limit
        left = wait_with_progress(service, self.meter, timeout=timeout, handle=handle)
        if left is None:
            self._service = self._new_service()
            give_up(service)
        elif left == 0.0 and handle is None and limit is None:
            self._is_late = True
        return left or 0.0

    def _wait_for_one(self, service: CheckpointService, handle: Handle) -> bool:
        """Wait for *handle* and raise its failure; return False if the user interrupted the wait."""
        left = self._wait(service, handle)
        given_up = self._service is not service
        if not given_up:
            handle.wait(left)
        return not given_up

    def _is_synchronous(self, url: str) -> bool:
        return self.synchronous or is_read_back(url)

    @contextmanager
    def _freeing_after(self, *, frees: bool) -> Iterator[None]:
        """Free the service's threads after an operation if *frees*: outside of a run, no teardown may follow."""
        operation = object()
        self._leave_to_parent()
        self._under_way.add(operation)
        try:
            yield
        finally:
            self._under_way.discard(operation)
            # Not while another operation runs, which a signal handler may have interrupted.
            if frees and not self._under_way:
                self._service.rest()

    def _remember_address(self, location: Location) -> None:
        """Remember the full address of a location before its first event, as events omit secrets."""
        if location.address != location.url:
            self._relay.addresses[location.url] = location.address

    def _request(
        self,
        location: Location,
        submit: Callable[[], Handle],
        *,
        exists: bool,
        target: Location | None = None,
    ) -> Handle:
        """Make a request, and announce it to other ranks."""
        group = pending_of_group()
        if group is None:
            handle = submit()
            self._pending_files.add(location, handle, exists=exists, target=target)
            return handle
        announcement = group.announce(location.key)
        raises = self._service.options.on_error == "raise"
        try:
            handle = submit()
            self._pending_files.add(location, handle, exists=exists, target=target)
            handle.add_done_callback(lambda ended: announcement.end(_failure_of(ended) if raises else None))
        except BaseException:  # other ranks must not wait for a request that was never made
            announcement.end()
            raise
        return handle


def _never() -> bool:
    return False


def _failure_of(handle: Handle) -> str | None:
    """Return the failure of an ended request, as other ranks get it."""
    failure = handle._failure
    return None if failure is None else f"{type(failure.error).__name__}: {failure.error}"
