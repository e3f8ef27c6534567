"""Forking while a thread of ours imports something: the child would have half of it, and could never import the rest.

Guarantees: what forks waits until our threads have come to the end of their imports, or for `IMPORT_SECONDS`. A
file system imports much as it is first used, and data loaders are often forked just after a first checkpoint.

What does not belong here: what a child does without (runtime, service).
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

__all__ = ["IMPORT_SECONDS", "finish_imports"]

IMPORT_SECONDS = 5.0
"""An import that takes longer waits, most probably, for one that the thread which forks is in the midst of."""

_PAUSE_SECONDS = 0.001
_OURS = ("async_ckpt", "fsspecIO")  # names of threads begin so; fsspec's works for us


def finish_imports() -> None:
    """Wait until no thread of ours is importing anything."""
    until = time.monotonic() + IMPORT_SECONDS
    while _is_importing() and time.monotonic() < until:
        time.sleep(_PAUSE_SECONDS)


def _is_importing() -> bool:
    # Python has no public way to ask: each module that is being imported has a lock, which knows its thread.
    references: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
    owners = {getattr(reference(), "owner", None) for reference in references.copy().values()} - {None}
    here = threading.get_ident()
    return any(
        thread.ident in owners and thread.ident != here
        for thread in (threading.enumerate() if owners else ())
        if thread.name.startswith(_OURS)
    )
