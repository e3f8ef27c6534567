"""Asynchronous checkpoints for PyTorch: ``save`` costs one copy in memory, and "saved" means durable."""

from __future__ import annotations

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
    RemovalDroppedError,
    ServiceClosedError,
    StoreError,
    SupersededError,
    ThrottledError,
    TransientStoreError,
    UnknownProtocolError,
    UnpicklableStateError,
)
from async_ckpt.handle import Handle, Report, State
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.options import ServiceOptions
from async_ckpt.retry import RetryPolicy
from async_ckpt.service import CheckpointService, load

__all__ = [
    "AbandonedError",
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
    "RemovalDroppedError",
    "Report",
    "RetryPolicy",
    "ServiceClosedError",
    "ServiceOptions",
    "State",
    "StoreError",
    "SupersededError",
    "ThrottledError",
    "TransientStoreError",
    "UnknownProtocolError",
    "UnpicklableStateError",
    "load",
]
