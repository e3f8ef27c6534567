"""The services behind the module's functions: one for each process group, made on first use.

Guarantees: all ranks of a group make their services in the same order if they make the same calls (O4). A service
whose group was destroyed is closed when the next one is made; all are closed when the interpreter exits (D4).

What does not belong here: what the services are asked to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch.distributed as dist

from async_ckpt.errors import FlushError, OptionError
from async_ckpt.options import ServiceOptions
from async_ckpt.service import CheckpointService
from async_ckpt.sharded.agreement.group import ALONE

__all__ = ["Services", "shared"]


@dataclass(frozen=True, slots=True)
class _Entry:
    group: Callable[[], Any]
    service: CheckpointService


class Services:
    """The services of one program. Threads may share this object."""

    def __init__(self) -> None:
        self._options: dict[str, Any] = {}
        self._entries: list[_Entry] = []
        self._lock = threading.RLock()  # as a signal handler may save, too

    def configure(self, options: dict[str, Any]) -> None:
        """Make services with *options* from now on; the present ones are closed first.

        Raises:
            OptionError: an option is not valid; nothing has changed.
            Exception: as `close` raises.
        """
        ServiceOptions.of(options)
        try:
            self.close(None)
        finally:
            self._options = options

    def of(self, process_group: Any, *, no_dist: bool) -> CheckpointService:
        """Return the service of *process_group*, as torch's functions take it.

        Raises:
            OptionError: this process is not one of its ranks.
        """
        group = _group(process_group, no_dist=no_dist)
        with self._lock:
            for entry in self._entries:
                if entry.group() is group:
                    return entry.service
            is_default = group is not ALONE and group is dist.group.WORLD
            service = CheckpointService(process_group=None if is_default else group, **self._options)
            service.known_as = "async_ckpt.dcp: call its close()"
            service.failures.keep_ambient_error()  # it may be made while an error of training is being handled
            self._take_over_from_ended(service)
            # By a weak reference: a destroyed group must be freed, and another may take its place.
            self._entries.append(_Entry((lambda: ALONE) if group is ALONE else ref(group), service))
            return service

    def close(self, timeout: float | None) -> None:
        """Close all services, within *timeout* seconds each.

        Raises:
            Exception: a save failed, and its error has not been raised yet; several are raised as one ``FlushError``.
        """
        with self._lock:
            entries, self._entries = self._entries, []
        errors: list[Exception] = []
        for entry in entries:
            try:
                entry.service.close(timeout)
            except FlushError as error:
                errors += error.exceptions
            except Exception as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise FlushError("several checkpoint requests failed", errors)

    def _take_over_from_ended(self, successor: CheckpointService) -> None:
        ended = [entry.service for entry in self._entries if entry.group() is None]
        self._entries = [entry for entry in self._entries if entry.group() is not None]
        for service in ended:
            failures = service.failures
            successor.failures.take_over(
                failures
            )  # otherwise, closing would raise them, and this call would fail
            service.close()
            successor.failures.take_over(failures)


def _group(process_group: Any, *, no_dist: bool) -> Any:
    if no_dist or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if dist.get_rank(process_group) < 0:
        raise OptionError(
            "process_group: this process is not one of its ranks; call this on its ranks only, or give no_dist=True"
        )
    return dist.group.WORLD if process_group is None else process_group


shared = Services()
"""The services that the module's functions use."""
