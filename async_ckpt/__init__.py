"""Asynchronous checkpoints for PyTorch: ``save`` costs one copy in memory, and "saved" means durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from async_ckpt.errors import (
    AbandonedError,
    AsyncCheckpointError,
    BackPressureError,
    CancelledSaveError,
    CheckpointExistsError,
    CorruptCheckpointError,
    FlushError,
    FlushTimeoutError,
    MemoryLimitError,
    MissingDependencyError,
    NotDurableError,
    OptionError,
    QueueFullError,
    RankError,
    RemovalDroppedError,
    ServiceClosedError,
    StateChangedError,
    StoreError,
    SupersededError,
    ThrottledError,
    TransientStoreError,
    UnknownProtocolError,
    UnpicklableStateError,
)
from async_ckpt.handle import Handle, Report, State
from async_ckpt.options import ServiceOptions
from async_ckpt.retry import RetryPolicy
from async_ckpt.service import CheckpointService, load

if TYPE_CHECKING:
    from async_ckpt.lightning.callback import AsyncCheckpointCallback
    from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = [
    "AbandonedError",
    "AsyncCheckpointCallback",
    "AsyncCheckpointError",
    "AsyncCheckpointIO",
    "BackPressureError",
    "CancelledSaveError",
    "CheckpointExistsError",
    "CheckpointService",
    "CorruptCheckpointError",
    "FlushError",
    "FlushTimeoutError",
    "Handle",
    "MemoryLimitError",
    "MissingDependencyError",
    "NotDurableError",
    "OptionError",
    "QueueFullError",
    "RankError",
    "RemovalDroppedError",
    "Report",
    "RetryPolicy",
    "ServiceClosedError",
    "ServiceOptions",
    "State",
    "StateChangedError",
    "StoreError",
    "SupersededError",
    "ThrottledError",
    "TransientStoreError",
    "UnknownProtocolError",
    "UnpicklableStateError",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import what Lightning needs when it is asked for, and make it known to what of Lightning is there by then."""
    from async_ckpt.lightning import registration

    if name == "AsyncCheckpointIO":
        from async_ckpt.lightning.plugin import AsyncCheckpointIO

        registration.introduce_plugin(AsyncCheckpointIO)
        return AsyncCheckpointIO
    if name == "AsyncCheckpointCallback":
        from async_ckpt.lightning.callback import AsyncCheckpointCallback

        registration.introduce_callback(AsyncCheckpointCallback)
        return AsyncCheckpointCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
