"""Marks a storage in host memory with the device that it stands for.

Guarantees: ``torch.save`` writes the original's location, such as ``"cuda:0"``, for a storage that was passed to
`mark`; all other storages are unaffected. Nothing is registered with torch before it is needed.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import serialization

__all__ = ["is_plain_cpu", "location_of", "mark"]

_ATTRIBUTE = "_async_ckpt_location"
_PRIORITY = -715_517  # before torch's own, which start at 10; odd, since torch cannot sort equal ones
_torchs = serialization.location_tag
_cpu_first = serialization._cpu_tag
_lock = threading.Lock()
_registered = False


def location_of(storage: torch.UntypedStorage) -> str:
    """Return the location that ``torch.save`` would write for *storage*.

    Raises:
        RuntimeError: torch does not know the device.
    """
    return str(serialization.location_tag(storage))  # by its name, as torch asks: some replace it


def is_plain_cpu() -> bool:
    """Return whether ``torch.save`` writes ``"cpu"`` for every storage in host memory, without asking anybody."""
    return serialization.location_tag is _torchs and serialization._package_registry[0][1] is _cpu_first


def mark(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    """Make ``torch.save`` write *location* for *storage*, and return the storage."""
    if location != "cpu":
        _register()
        setattr(storage, _ATTRIBUTE, location)
    return storage


def _register() -> None:
    global _registered
    with _lock:
        if not _registered:
            serialization.register_package(_PRIORITY, _tag, _no_deserializer)
            _registered = True


def _tag(storage: Any) -> str | None:
    return getattr(storage, _ATTRIBUTE, None)


def _no_deserializer(storage: Any, location: str) -> None:
    return None
