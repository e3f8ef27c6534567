"""The names of temporary files and of files put aside, and the processes that own them.

Guarantees: a name contains its process's id and where that id is valid: the boot and the container. ``owner_is_dead``
returns True only for a process of the same boot and container that no longer runs; if these cannot be found out, no
other process sweeps the file (D2).

What does not belong here: listing, locking and deleting, which differ between stores.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import socket
import sys
from pathlib import Path

__all__ = [
    "aside_of",
    "host_name",
    "is_leftover",
    "marked_owner_is_dead",
    "name_aside",
    "owner_is_dead",
    "owner_mark",
    "temporary_name",
]

_OWNER = r"(?P<host>[0-9a-f]{12})\.(?P<pid>[0-9]{1,10})"
_PATTERN = re.compile(rf"\.async_ckpt\.{_OWNER}\.[0-9a-f]{{16}}\.tmp")
_ASIDE = re.compile(rf"(?P<name>.+)\.previous-{_OWNER}\.[0-9a-f]{{8}}", re.DOTALL)
_PROC = Path("/proc")


def temporary_name() -> str:
    """Return a fresh name, short enough for every directory."""
    return f".async_ckpt.{_host()}.{os.getpid()}.{secrets.token_hex(8)}.tmp"


def name_aside(name: str) -> str:
    """Return a fresh name for the file *name*, while another file replaces it."""
    return f"{name}.previous-{_host()}.{os.getpid()}.{secrets.token_hex(4)}"


def aside_of(name: str) -> str | None:
    """Return the name from which ``name_aside`` made *name*; None if it did not."""
    match = _ASIDE.fullmatch(name)
    return None if match is None else match["name"]


def is_leftover(name: str) -> bool:
    """Return whether ``temporary_name`` makes such a name."""
    return _PATTERN.fullmatch(name) is not None


def owner_is_dead(name: str) -> bool:
    """Return whether the process that made *name* has certainly ended."""
    match = _PATTERN.fullmatch(name) or _ASIDE.fullmatch(name)
    return match is not None and _is_dead(match["host"], match["pid"])


def owner_mark() -> str:
    """Return what tells this process in a name that is made elsewhere."""
    return f"{_host()}.{os.getpid()}"


def marked_owner_is_dead(mark: str) -> bool:
    """Return whether the process that *mark* tells surely runs no more."""
    return _is_dead(*mark.split("."))


def _is_dead(host: str, pid: str) -> bool:
    if host != _host():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False  # it runs, under another user
    return False


@functools.cache
def _host() -> str:
    """Return the ``host_name`` of this process."""
    return host_name(_PROC)


os.register_at_fork(after_in_child=_host.cache_clear)  # a child may be the first of a container


def host_name(proc: Path) -> str:
    """Return a name for the set of processes that share their process ids with this one.

    Host names are not unique, nor are the numbers of containers, which are reused after a boot; the boot id tells them
    apart.

    Args:
        proc: the root of the proc file system.

    Returns:
        The name; unique to this process if the system does not show enough.
    """
    identity = [socket.gethostname(), _read(Path("/etc/machine-id"))]
    if sys.platform == "linux":  # no other system that torch runs on gives a process several ids
        try:
            namespace = os.readlink(proc / "self/ns/pid")
        except OSError:
            namespace = ""
        boot = _read(proc / "sys/kernel/random/boot_id")
        if not (namespace and boot):
            return secrets.token_hex(6)
        identity += [namespace, boot]
    return hashlib.blake2b("\0".join(identity).encode(), digest_size=6).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
