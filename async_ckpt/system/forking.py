"""Delays a fork while one of our threads imports a module: the child could never complete the import.

Guarantees: a fork waits until our threads have ended their imports, at most for `IMPORT_SECONDS`. A file system imports
many modules at its first use, and data loaders are often forked just after the first checkpoint.

What does not belong here: the state of a forked child (runtime, service).
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

__all__ = ["IMPORT_SECONDS", "finish_imports"]

IMPORT_SECONDS = 5.0
"""An import that takes longer most probably waits for an import of the thread that forks."""

_PAUSE_SECONDS = 0.001
_OURS = ("async_ckpt", "fsspecIO")  # names of threads begin so; fsspec's works for us


def finish_imports() -> None:
    """Wait until none of our threads is importing a module."""
    until = time.monotonic() + IMPORT_SECONDS
    while _is_importing() and time.monotonic() < until:
        time.sleep(_PAUSE_SECONDS)


def _is_importing() -> bool:
    # Python has no public way to find out: each module that is being imported has a lock, which knows its thread.
    references: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})
    owners = {getattr(reference(), "owner", None) for reference in references.copy().values()} - {None}
    here = threading.get_ident()
    return any(
        thread.ident in owners and thread.ident != here
        for thread in (threading.enumerate() if owners else ())
        if thread.name.startswith(_OURS)
    )
