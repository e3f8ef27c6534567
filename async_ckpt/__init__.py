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
    IncompleteCheckpointError,
    MemoryLimitError,
    MissingDependencyError,
    NotDurableError,
    OptionError,
    QueueFullError,
    RankError,
    RemovalDroppedError,
    ServiceClosedError,
    ShardedSaveError,
    StateChangedError,
    StoreError,
    SupersededError,
    ThrottledError,
    TransientStoreError,
    UnknownProtocolError,
    UnpicklableStateError,
)
from async_ckpt.functions import consolidate, latest, load, load_sharded
from async_ckpt.handle import Handle, Report, State
from async_ckpt.options import ServiceOptions
from async_ckpt.retry import RetryPolicy
from async_ckpt.service import CheckpointService

if TYPE_CHECKING:
    from async_ckpt.lightning import AsyncCheckpointCallback, AsyncCheckpointIO

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
    "IncompleteCheckpointError",
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
    "ShardedSaveError",
    "State",
    "StateChangedError",
    "StoreError",
    "SupersededError",
    "ThrottledError",
    "TransientStoreError",
    "UnknownProtocolError",
    "UnpicklableStateError",
    "consolidate",
    "latest",
    "load",
    "load_sharded",
]


def __getattr__(name: str) -> Any:
    """Import what Lightning needs when it is asked for."""
    if name in ("AsyncCheckpointCallback", "AsyncCheckpointIO"):
        from async_ckpt import lightning

        return getattr(lightning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
