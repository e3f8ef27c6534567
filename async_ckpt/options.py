"""The options: their names, defaults and validation. No default is decided anywhere else.

An options object is validated when it is made. It is frozen and holds no runtime, so it can be pickled and copied.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

from async_ckpt.errors import OptionError
from async_ckpt.events import Observer
from async_ckpt.retry import RetryPolicy
from async_ckpt.system.limits import smallest_bound
from async_ckpt.telemetry.patience import Limit

__all__ = [
    "DirectSaves",
    "Durability",
    "InPlace",
    "OnError",
    "Overflow",
    "PageCache",
    "Priority",
    "ServiceOptions",
    "SnapshotStrategy",
    "check_direct_saves",
    "check_grace",
    "parse_bytes",
]

logger = logging.getLogger(__name__)

Priority = Literal["normal", "background"]
Overflow = Literal["block", "raise", "supersede"]
OnError = Literal["raise", "warn"]
Durability = Literal["fsync", "process"]
InPlace = Literal["refuse", "allow"]
PageCache = Literal["auto", "keep", "drop"]
DirectSaves = Literal["durable", "async"]
SnapshotStrategy = Literal["auto", "copy", "lazy"]

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power

MINIMUM_PART_BYTES = 64 * 1024


def parse_bytes(text: int | str, *, option: str) -> int:
    """Return a number of bytes from an int or from text such as ``"8GiB"``, ``"500 MB"``.

    Raises:
        OptionError: *text* is not a positive number of bytes; the message names *option*.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        nbytes = text
    elif isinstance(text, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)):
        unit = match[2].upper()
        if unit not in _UNITS:
            raise OptionError(
                f"{option}={text!r}: unknown unit {match[2]!r}; use KiB, MiB, GiB, TiB or KB … TB"
            )
        nbytes = int(float(match[1]) * _UNITS[unit])
    else:
        raise OptionError(f"{option}={text!r}: give bytes as an int, or text such as '8GiB'")
    if nbytes <= 0:
        raise OptionError(f"{option}={text!r}: must be more than zero bytes")
    return nbytes


def default_memory_limit(root: Path = Path("/")) -> int:
    """Return half of the memory that this process may use, in bytes; *root* has ``/proc`` and ``/sys``."""
    bound = smallest_bound(root)
    logger.debug(
        "memory_limit is %d bytes, half of %d, from %s", bound.nbytes // 2, bound.nbytes, bound.source
    )
    return bound.nbytes // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """All options of a service or a plugin; the names are the same everywhere.

    Attributes:
        queue_depth: how many saves may be pending, running ones included (B1).
        memory_limit: host bytes that snapshots may hold together, as an int or ``"8GiB"``; ``None`` is half of what the
            process's control groups, ``RLIMIT_AS`` and the machine allow. A single larger save runs alone.
        overflow: what ``save`` does when there is no room: ``"block"`` waits, ``"raise"`` raises a
            ``BackPressureError``, ``"supersede"`` replaces a queued save of the same location that has not started, and
            waits if there is none.
        snapshot: how the snapshot is taken: ``"copy"`` copies into reused host buffers before ``save`` returns.
            ``"lazy"`` copies what only an optimizer's step changes in the background, before that optimizer's next
            step, and everything else before ``save`` returns: until that step, weights must not be changed in another
            way, which fails the save if torch counts the change. ``"auto"`` is ``"copy"``.
        verify_snapshots: compare checksums of the state at the call with those of the snapshot when it is written, and
            fail the save if they differ; for finding what changes a state unseen. Reads everything twice more.
        max_concurrent_saves: how many saves are written at the same time.
        priority: of writes to local disks, on Linux: ``"background"`` leaves most of busy CPUs to training until
            somebody waits for a save, or it is late; until then, the save may take seconds more. It needs a right that
            few users have; without it, nothing changes.
        part_size: the largest number of bytes in one storage request, as an int or ``"128MiB"``. A store uses more if a
            very large file needs it, and less if a connection would otherwise be idle.
        max_concurrent_parts: how many storage requests of one save run at the same time; on local disks at most half
            the number of CPUs, or two past the page cache.
        retry: when a failed storage request is repeated.
        durability: ``"fsync"`` survives a loss of power; ``"process"`` survives only the loss of the process, and is
            faster on local disks. It makes no difference for object stores.
        overwrite: whether a save may replace an existing file; if not, it fails with a ``CheckpointExistsError``.
            Object stores and local disks check at the commit, others just before it.
        in_place: what to do on a mount that cannot rename files. ``"refuse"`` fails the save before its first byte.
            ``"allow"`` writes the file directly under its final name, as ``torch.save`` does: after a failure or a
            kill, the earlier checkpoint is lost, and the new one is missing or torn.
        page_cache: on local disks: ``"keep"`` writes through the system's page cache, so a load that follows soon may
            find the file in memory; ``"drop"`` writes past it, which takes a fraction of the CPU time and leaves the
            cache to others, and a load reads from the disk. ``"auto"`` drops files of 128 MiB and more where the system
            tells that it can (Linux 6.1 or later), if ``durability`` is ``"fsync"``, and keeps others.
        on_error: ``"raise"`` raises the error of a failed save at the next call; ``"warn"`` logs it and issues a
            warning.
        flush_timeout: seconds without progress after which every wait for pending saves gives up: ``wait``, ``flush``,
            ``close``, teardown, the interpreter's exit, a ``save`` that waits for room, a ``load`` that waits for a
            save. Any transferred byte counts as progress, and so does any request that begins or ends. A base
            CheckpointIO reports no progress: with one, this must be longer than a save takes.
        flush_deadline: seconds after which these waits give up even if there is progress, for example because a
            scheduler is about to end the job; ``None`` sets no limit. A ``timeout`` that is passed to ``wait``,
            ``flush`` or ``close`` replaces both.
        agreement_timeout: seconds that the ranks of a sharded save wait for one that has not come to it (E5).
        silence_timeout: seconds after which they count a rank as ended that has come, and of which nothing is heard any
            more; also for how long an event loop may stand still there.
        storage_options: passed to the fsspec file system.
        observer: called with every event; see ``async_ckpt.events``.

    Raises:
        OptionError: a value is not valid; the message says which values are.
    """

    queue_depth: int = 2
    memory_limit: int | str | None = None
    overflow: Overflow = "block"
    snapshot: SnapshotStrategy = "auto"
    verify_snapshots: bool = False
    max_concurrent_saves: int = 1
    priority: Priority = "normal"
    part_size: int | str = "128MiB"
    max_concurrent_parts: int = 4
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    durability: Durability = "fsync"
    overwrite: bool = True
    in_place: InPlace = "refuse"
    page_cache: PageCache = "auto"
    on_error: OnError = "raise"
    flush_timeout: float = 1800.0
    flush_deadline: float | None = None
    agreement_timeout: float = 600.0
    silence_timeout: float = 60.0
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)  # there are secrets in it
    observer: Observer | None = field(default=None, repr=False)  # it may well hold one

    def __post_init__(self) -> None:
        for name in ("queue_depth", "max_concurrent_saves", "max_concurrent_parts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r}: must be an int of at least 1")
        _one_of(self, "overflow", ("block", "raise", "supersede"))
        _one_of(self, "snapshot", ("auto", "copy", "lazy"))
        _one_of(self, "priority", ("normal", "background"))
        _one_of(self, "durability", ("fsync", "process"))
        _one_of(self, "in_place", ("refuse", "allow"))
        _one_of(self, "page_cache", ("auto", "keep", "drop"))
        _one_of(self, "on_error", ("raise", "warn"))
        for name in ("overwrite", "verify_snapshots"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit, option="memory_limit")
        if self.part_size_bytes < MINIMUM_PART_BYTES:
            raise OptionError(f"part_size={self.part_size!r}: must be at least 64KiB")
        for name in ("flush_timeout", "agreement_timeout", "silence_timeout"):
            _check_seconds(name, getattr(self, name))
        if self.flush_deadline is not None:
            _check_seconds("flush_deadline", self.flush_deadline)
        if not isinstance(self.retry, RetryPolicy):
            raise OptionError(f"retry={_kind(self.retry)}: must be a RetryPolicy")
        if self.storage_options is not None and not isinstance(self.storage_options, Mapping):
            raise OptionError(f"storage_options={_kind(self.storage_options)}: must be a mapping")
        if self.observer is not None and not callable(self.observer):
            raise OptionError(f"observer={_kind(self.observer)}: must be callable with one event")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> ServiceOptions:
        """Make the options from keyword arguments; the error for an unknown name lists the known ones."""
        known = [item.name for item in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}")
        return cls(**options)

    def limit(self, timeout: float | None) -> Limit:
        """Return the limit for a wait for pending saves; *timeout* is the caller's, or None."""
        if timeout is not None:
            return Limit.hard(timeout)
        deadline = math.inf if self.flush_deadline is None else self.flush_deadline
        return Limit(idle_seconds=self.flush_timeout, total_seconds=deadline)

    @property
    def memory_limit_bytes(self) -> int:
        """``memory_limit`` in bytes, with the default computed."""
        if self.memory_limit is None:
            return default_memory_limit()
        return parse_bytes(self.memory_limit, option="memory_limit")

    @property
    def part_size_bytes(self) -> int:
        """``part_size`` in bytes."""
        return parse_bytes(self.part_size, option="part_size")


def check_grace(seconds: object) -> float:
    """Return ``abandon_grace_seconds`` if it is valid.

    Raises:
        OptionError: it is not.
    """
    if not _is_finite(seconds) or seconds < 0:
        raise OptionError(
            f"abandon_grace_seconds={seconds!r}: must be a finite number of seconds, at least zero; "
            "zero leaves unfinished work behind at once"
        )
    return seconds


def check_direct_saves(value: object) -> DirectSaves:
    """Return a plugin's ``direct_saves`` if it is one of the two.

    Raises:
        OptionError: it is not.
    """
    if value == "durable":
        return "durable"
    if value == "async":
        return "async"
    raise OptionError(f"direct_saves={value!r}: must be one of 'durable', 'async'")


def _check_seconds(name: str, seconds: object) -> None:
    if not _is_finite(seconds) or seconds <= 0:
        raise OptionError(f"{name}={seconds!r}: must be a finite number of seconds, more than zero")


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: object) -> str:
    """Return how an error may name *value*: by its type alone if it may be, or contain, a secret."""
    return f"<{type(value).__name__}>"


def _one_of(options: ServiceOptions, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(options, name)
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
