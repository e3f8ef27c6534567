"""The services behind the module's functions: one for each process group, made on first use.

Guarantees: every rank of a group makes its services in the same order, as long as all make the same calls (O4). One
whose group has ended is closed when the next is made; all are, when the interpreter ends (D4).

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
    """The services of one program; threads may share it."""

    def __init__(self) -> None:
        self._options: dict[str, Any] = {}
        self._entries: list[_Entry] = []
        self._lock = threading.RLock()  # as a signal handler may save, too

    def configure(self, options: dict[str, Any]) -> None:
        """Have services made with *options* from now on; those that are there are closed first.

        Raises:
            OptionError: an option cannot work; nothing is changed.
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
            OptionError: this process is none of its ranks.
        """
        group = _group(process_group, no_dist=no_dist)
        with self._lock:
            for entry in self._entries:
                if entry.group() is group:
                    return entry.service
            is_default = group is not ALONE and group is dist.group.WORLD
            service = CheckpointService(process_group=None if is_default else group, **self._options)
            service.known_as = "async_ckpt.dcp: call its close()"
            service.failures.keep_ambient_error()  # made on demand, maybe where training's error is handled
            self._take_over_from_ended(service)
            # Weakly, as a group that was destroyed is not to live on, and another may come in its place.
            self._entries.append(_Entry((lambda: ALONE) if group is ALONE else ref(group), service))
            return service

    def close(self, timeout: float | None) -> None:
        """Close all, at most *timeout* seconds each.

        Raises:
            Exception: a save failed and nobody has been told yet; several come as one ``FlushError``.
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
            successor.failures.take_over(failures)  # lest closing raise them: this call is to be carried out
            service.close()
            successor.failures.take_over(failures)


def _group(process_group: Any, *, no_dist: bool) -> Any:
    if no_dist or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if dist.get_rank(process_group) < 0:
        raise OptionError(
            "process_group: this process is none of its ranks; call it on those alone, or give no_dist=True"
        )
    return dist.group.WORLD if process_group is None else process_group


shared = Services()
"""Those of the module's functions."""
