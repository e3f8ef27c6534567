"""The write-behind queue: decides which operations are admitted, started, superseded, cancelled or dropped.

It only decides: there are no threads, clocks, storage or awaits here. A decision is returned as a plain record. The
rules are in ``queue.queue``.

What does not belong here: carrying out decisions (dispatch).
"""

from __future__ import annotations

from async_ckpt.engine.queue.history import History
from async_ckpt.engine.queue.operation import (
    LINK,
    LOAD,
    QUEUED,
    REMOVE,
    RUNNING,
    SAVE,
    STAGING,
    WAITING,
    Action,
    Admit,
    Cancel,
    Drop,
    Kind,
    Lane,
    Op,
    Phase,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.engine.queue.queue import Queue

__all__ = [
    "LINK",
    "LOAD",
    "QUEUED",
    "REMOVE",
    "RUNNING",
    "SAVE",
    "STAGING",
    "WAITING",
    "Action",
    "Admit",
    "Cancel",
    "Drop",
    "History",
    "Kind",
    "Lane",
    "Op",
    "Phase",
    "Queue",
    "Refuse",
    "Start",
    "Supersede",
]
