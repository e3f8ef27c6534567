"""Every exception that async_ckpt raises, in one place.

::

    AsyncCheckpointError (Exception)
    ├── OptionError (ValueError)             an option has a value that cannot work
    ├── UnpicklableStateError (TypeError)    the state holds an object that pickle refuses
    ├── StateChangedError (RuntimeError)     the state was changed while it was being saved
    ├── StoreError (OSError)                 a storage operation failed
    │   ├── UnknownProtocolError (ValueError)    fsspec knows no file system for the URL's protocol
    │   ├── CheckpointExistsError (FileExistsError)  overwrite=False, and the location is taken
    │   ├── CorruptCheckpointError               what was read is not what was written
    │   ├── IncompleteCheckpointError (FileNotFoundError)  a directory without .metadata
    │   ├── RankError                            another rank failed to write a checkpoint that this rank needs
    │   └── TransientStoreError                  repeating the request may help
    │       └── ThrottledError                       the store asks for fewer requests
    ├── MissingDependencyError (ImportError) the file system's package is not installed
    ├── BackPressureError                    overflow="raise" and there is no room
    │   ├── QueueFullError
    │   └── MemoryLimitError
    ├── NotDurableError                      an accepted request ended without taking effect
    │   ├── SupersededError
    │   ├── CancelledSaveError
    │   ├── AbandonedError                       the service was closed, or the process ended, before it finished
    │   └── RemovalDroppedError                  deleting the file was not safe
    ├── ShardedSaveError                     a sharded save is not durable: ranks failed, or ended
    ├── ServiceClosedError (RuntimeError)
    ├── FlushTimeoutError (TimeoutError)     a wait timed out; the saves go on
    └── FlushError (ExceptionGroup)          several saves failed

Errors of other libraries are translated where they enter, with ``from``, and keep their ``errno``. Errors raised by a
user's own ``CheckpointIO`` are not translated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    _ExceptionGroup = ExceptionGroup
else:  # anyio depends on the backport there
    from exceptiongroup import ExceptionGroup as _ExceptionGroup

__all__ = [
    "AbandonedError",
    "AsyncCheckpointError",
    "BackPressureError",
    "CancelledSaveError",
    "CheckpointExistsError",
    "CorruptCheckpointError",
    "FlushError",
    "FlushTimeoutError",
    "IncompleteCheckpointError",
    "MemoryLimitError",
    "MissingDependencyError",
    "NotDurableError",
    "OptionError",
    "QueueFullError",
    "RankError",
    "RemovalDroppedError",
    "ServiceClosedError",
    "ShardedSaveError",
    "StateChangedError",
    "StoreError",
    "SupersededError",
    "ThrottledError",
    "TransientStoreError",
    "UnknownProtocolError",
    "UnpicklableStateError",
]


_RANKS_NAMED = 8
"""How many ranks a message names."""

_SYSTEM_ATTRIBUTES = ("errno", "strerror", "filename", "filename2")


class AsyncCheckpointError(Exception):
    """The base class of all errors that async_ckpt defines."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle ``errno`` and the like, which OSError keeps outside of ``__dict__``."""
        reduced = super().__reduce__()
        assert isinstance(reduced, tuple)
        made, arguments, *state = reduced
        system_attributes = {name: getattr(self, name, None) for name in _SYSTEM_ATTRIBUTES}
        known = {name: value for name, value in system_attributes.items() if value is not None}
        return made, arguments, {**(state[0] if state else {}), **known}


class OptionError(AsyncCheckpointError, ValueError):
    """An option has a value that cannot work."""


class UnpicklableStateError(AsyncCheckpointError, TypeError):
    """The state holds an object that pickle refuses; the message says where in the state.

    Attributes:
        where: the path to the object, such as ``state['callbacks']['timer']``.
    """

    def __init__(self, message: str, *, where: str = "state") -> None:
        super().__init__(message)
        self.where = where


class StateChangedError(AsyncCheckpointError, RuntimeError):
    """The state was changed while it was being saved; nothing was saved.

    Raised by ``save`` where another thread freed or resized memory, and by the handle with ``snapshot="lazy"``.

    Attributes:
        where: the path to what was changed, such as ``state['model']['weight']``; empty if it is not known.
    """

    def __init__(self, message: str, *, where: str = "") -> None:
        super().__init__(message)
        self.where = where


class StoreError(AsyncCheckpointError, OSError):
    """A store could not do what was asked of it.

    Attributes:
        location: the URL or path concerned, passwords and signatures hidden.
        stage: the operation that failed: ``"begin"``, ``"write"``, ``"commit"``, ``"delete"``, ``"read"``, …
        errno: the operating system's error number, or ``None``.
    """

    def __init__(self, message: str, *, location: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.location = location
        self.stage = stage

    @classmethod
    def during(cls, stage: str, location: str, cause: BaseException, advice: str = "") -> StoreError:
        """Translate *cause*, keeping its errno; raise the result ``from`` it."""
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        message = f"cannot {stage} {location!r}: {reason}"
        error = cls(f"{message}. {advice}" if advice else message, location=location, stage=stage)
        number = getattr(cause, "errno", None)
        if isinstance(number, int):
            error.errno = number
        return error


class UnknownProtocolError(StoreError, ValueError):
    """fsspec knows no file system for the URL's protocol."""


class CheckpointExistsError(StoreError, FileExistsError):
    """``overwrite=False``, and the location already has a file, which is left untouched."""


class CorruptCheckpointError(StoreError):
    """The file is damaged: a checksum does not match, or the file is incomplete."""


class IncompleteCheckpointError(StoreError, FileNotFoundError):
    """There is no complete sharded checkpoint: no directory with ``.metadata``, which is written last."""

    @classmethod
    def at(cls, location: str) -> IncompleteCheckpointError:
        """Return the error of a directory."""
        what = f"there is no complete checkpoint at {location!r}: no file, and no directory with .metadata"
        return cls(
            f"{what}. async_ckpt.latest() finds the newest complete one.", location=location, stage="read"
        )


class RankError(StoreError):
    """Another rank failed to write a checkpoint that this rank needs, or ended without reporting its outcome.

    The message contains the other rank's error.
    """


class TransientStoreError(StoreError):
    """A request failed, and repeating it may succeed (E3)."""


class ThrottledError(TransientStoreError):
    """The store asks for fewer requests: a 429, or a 503 such as S3's ``SlowDown``."""


class MissingDependencyError(AsyncCheckpointError, ImportError):
    """The package that serves the URL's protocol is not installed; the message names it."""


class BackPressureError(AsyncCheckpointError):
    """There is no room for another save, and ``overflow="raise"``; the save was not accepted."""


class QueueFullError(BackPressureError):
    """``queue_depth`` saves are pending already."""


class MemoryLimitError(BackPressureError):
    """The snapshot does not fit within ``memory_limit`` beside the snapshots of pending saves."""


class NotDurableError(AsyncCheckpointError):
    """An accepted request ended without taking effect, though it did not fail itself."""


class SupersededError(NotDurableError):
    """A newer save of the same location replaced this one before it started."""


class CancelledSaveError(NotDurableError):
    """A ``remove`` of the same location cancelled this save before it started."""


class AbandonedError(NotDurableError):
    """The service was closed, or the process ended, before the request finished."""


class RemovalDroppedError(NotDurableError):
    """Nothing was deleted: an earlier save did not become durable, or a base CheckpointIO did not delete the file."""


class ShardedSaveError(AsyncCheckpointError):
    """A sharded save is not durable: at least one rank could not do its part, or ended. Every rank gets the same (E4).

    Attributes:
        failures: why, by rank.
        location: the URL or path concerned, passwords and signatures hidden.
    """

    def __init__(
        self, message: str, *, failures: Mapping[int, str] | None = None, location: str = ""
    ) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})
        self.location = location

    @classmethod
    def of(cls, location: str, failures: Mapping[int, str]) -> ShardedSaveError:
        """Return an error that names the ranks that failed, each with its reason."""
        ranks = sorted(failures)
        reasons = [f"rank {rank}: {failures[rank]}" for rank in ranks[:_RANKS_NAMED]]
        if len(ranks) > _RANKS_NAMED:
            reasons.append(f"and {len(ranks) - _RANKS_NAMED} more ranks, see .failures")
        message = (
            f"the sharded save to {location!r} failed for all ranks: {'; '.join(reasons)}. "
            "Fix the cause, and save again"
        )
        return cls(message, failures={rank: failures[rank] for rank in ranks}, location=location)


class ServiceClosedError(AsyncCheckpointError, RuntimeError):
    """The service has been closed."""


class FlushTimeoutError(AsyncCheckpointError, TimeoutError):
    """A wait timed out before the saves ended. They go on, and their outcome is still reported."""


class FlushError(AsyncCheckpointError, _ExceptionGroup[Exception]):
    """Several saves failed since errors were last collected.

    Attributes:
        exceptions: the failures, oldest first, each with its worker's traceback.
    """

    def derive(self, excs: Any) -> FlushError:  # type: ignore[override]  # a group of Exceptions only
        """Return a group of *excs* with the same message; ``except*`` needs this method."""
        return FlushError(self.message, excs)
