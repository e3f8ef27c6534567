"""The names of temporary files, and whose they are: pure but for asking the system who it is.

Guarantees: a name tells its host and its process. ``owner_is_dead`` answers True only for a process
of this very host, and of this very container, that no longer runs (D2).

What does not belong here: listing, locking and deleting, which each store does its own way.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

__all__ = ["is_leftover", "is_of_this_host", "owner_is_dead", "temporary_name"]

_PATTERN = re.compile(r"\.async_ckpt\.(?P<host>[0-9a-f]{12})\.(?P<pid>[0-9]{1,10})\.[0-9a-f]{16}\.tmp")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO: the host itself, not a container


def temporary_name() -> str:
    """Return a fresh name; short, so that it fits wherever the final name does."""
    return f".async_ckpt.{_host()}.{os.getpid()}.{secrets.token_hex(8)}.tmp"


def is_leftover(name: str) -> bool:
    """Tell whether *name* is one that ``temporary_name`` gives."""
    return _PATTERN.fullmatch(name) is not None


def is_of_this_host(name: str) -> bool:
    """Tell whether a process of this host, and of this container, made *name*."""
    match = _PATTERN.fullmatch(name)
    return match is not None and match["host"] == _host()


def owner_is_dead(name: str) -> bool:
    """Tell whether the process that made *name* surely runs no more."""
    match = _PATTERN.fullmatch(name)
    if match is None or match["host"] != _host():
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False  # it runs, under another user
    return False


@functools.cache
def _host() -> str:
    """Return a name for where process ids mean what they mean here."""
    identity = [socket.gethostname(), _read("/etc/machine-id")]
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = _FIRST_PID_NAMESPACE
    if namespace != _FIRST_PID_NAMESPACE:
        # Containers have hosts of one name, and ids of their own; their number is given out again
        # after a boot. A host by itself keeps its name over a boot, and then all ids are dead.
        identity += [namespace, _read("/proc/sys/kernel/random/boot_id")]
    return hashlib.blake2b("\0".join(identity).encode(), digest_size=6).hexdigest()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
