"""The write-behind queue: who may come in, who may start, who is not needed any more.

It decides and does nothing else: no thread, no clock, no storage, no awaiting. What is to be done comes back as a
plain record; the rules are in ``queue.queue``.

What does not belong here: carrying out (dispatch).
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
