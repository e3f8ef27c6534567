"""Calls on a file system of which only fsspec's interface is known, where fsspec's own helpers would hide an error.

Guarantees: what cannot be told is an error, never "there is nothing"; names are taken literally; what is not
empty is not removed as a directory; within ``translating``, errors are ``StoreError``.

What does not belong here: which calls, and in which order.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location

__all__ = ["end_connection", "info_of", "remove_empty_directory", "remove_file", "translating"]


def info_of(file_system: Any, path: str) -> dict[str, Any] | None:
    """Return what the file system tells about *path* now; None if nothing is there."""
    file_system.invalidate_cache()
    try:
        return dict(file_system.info(path))
    except FileNotFoundError:
        return None


def remove_file(file_system: Any, path: str) -> None:
    """Remove one file."""
    try:
        file_system.rm_file(path)
    except NotImplementedError:
        if glob.has_magic(path):
            raise
        file_system.rm(path)  # the only one that some have


def remove_empty_directory(file_system: Any, path: str) -> None:
    """Remove a directory, unless there is something in it: not every ``rmdir`` looks, Arrow's for one."""
    file_system.invalidate_cache()
    if all(name.strip("/") == path.strip("/") for name in file_system.ls(path, detail=False)):
        file_system.rmdir(path)


def end_connection(file_system: Any) -> None:
    """Close the client inside *file_system*: fsspec has no call for it, and paramiko's keeps a thread (B2)."""
    client = getattr(file_system, "client", None)  # of SFTP; of WebDAV it has one itself
    close = getattr(getattr(client, "http", client), "close", None)
    if callable(close):
        with suppress(Exception):
            close()


@contextmanager
def translating(stage: str, location: Location) -> Iterator[None]:
    """Raise what goes wrong as a StoreError; FileNotFoundError of a read is raised as it is."""
    try:
        yield
    except StoreError:
        raise
    except NotImplementedError as error:
        advice = f"{type(error).__name__}: this file system cannot do that; save to another."
        raise StoreError.during(stage, location.url, error, advice) from error
    except Exception as error:
        if stage == "read" and isinstance(error, FileNotFoundError):
            raise
        raise StoreError.during(stage, location.url, error) from error
