"""Recognizes, by their names, files that Lightning reads back without asking the plugin that wrote them.

Such a file must be durable when its save returns. They are read: in a requeued job; in the process that spawned the
training; on all ranks, when a tuner is done; in Fabric's XLAFSDPStrategy, which merges many files into one.

What does not belong here: waiting for the file (session).
"""

from __future__ import annotations

import re

__all__ = ["is_for_requeue", "is_of_spawned_process", "is_read_back"]

_REQUEUE = re.compile(r"(.*[/\\])?hpc_ckpt_\d+\.ckpt")
_SPAWN_RESULT = re.compile(r"(.*[/\\])?\.temp\.ckpt")
_READ_BACK = re.compile(
    r"(.*[/\\])?"
    r"(\.temp\.ckpt|\.(lr_find|scale_batch_size)_[^/\\]*\.ckpt|checkpoint_rank-\d+-of-\d+\.pth)"
)


def is_for_requeue(url: str) -> bool:
    """Return whether it is the checkpoint from which a requeued job resumes."""
    return _REQUEUE.fullmatch(url) is not None


def is_of_spawned_process(url: str) -> bool:
    """Return whether a spawned process passes its result to its parent in it."""
    return _SPAWN_RESULT.fullmatch(url) is not None


def is_read_back(url: str) -> bool:
    """Return whether code of Lightning reads it right after its save."""
    return _READ_BACK.fullmatch(url) is not None
