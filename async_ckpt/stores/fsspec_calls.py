"""Calls on any file system through fsspec's interface, where fsspec's own helpers would hide errors.

Guarantees: a failed look-up is an error, and never means that nothing is there; names are taken literally; only empty
directories are removed; within ``translating``, errors become ``StoreError``. Knowledge of single file systems is here:
where those of FTP and SFTP keep their connection, and how it ends.

What does not belong here: the order of calls.
"""

from __future__ import annotations

import errno
import glob
import os
import posixpath
import re
import socket
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec.spec

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location

__all__ = [
    "bound_waiting",
    "children_of",
    "end_connection",
    "end_half_made",
    "has_ended",
    "info_of",
    "info_of_file",
    "marks_lost",
    "mode_of",
    "modified_in",
    "remove_empty_directory",
    "remove_file",
    "set_mode",
    "translating",
    "version_in",
]

# The keys under which file systems report attributes that change with a file's content.
_VERSION = (
    "size",
    "ETag",
    "etag",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "created",
    "mtime",
    "modified",
    "modificationTime",
    "modify",  # of FTP, as the next
    "unique",
    "ino",
    "generation",
)

# What they call the time at which a file was written, the likeliest first; of files that are only ever written whole,
# as objects are, it is when they were created.
_MODIFIED = (
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "modified",
    "modify",
    "modificationTime",
    "updated",
    "created",
)

# Besides Python's own ConnectionError and TimeoutError.
_LOST = frozenset({errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ENOTCONN})
# By name, so that nothing is imported. An answer that fits no request belongs to another one.
_LOST_BY_NAME = frozenset(
    {
        "ftplib.error_proto",
        "ftplib.error_reply",
        "httpx.RemoteProtocolError",
        "paramiko.ssh_exception.NoValidConnectionsError",
        "ssl.SSLEOFError",
        "ssl.SSLZeroReturnError",
    }
)
# The server closes the connection; a data connection cannot be opened. Not 426, which also means a full disk.
_LOST_BY_FTP = ("421", "425")
# No such directory; or the server lacks the command, and fsspec got by without it.
_NOTHING_BY_FTP = ("550", "500", "501", "502", "504")


def info_of(file_system: Any, path: str) -> dict[str, Any] | None:
    """Return the file system's info about *path*, uncached; None if nothing is there."""
    try:
        return info_of_file(file_system, path)
    except FileNotFoundError:
        return None


def info_of_file(file_system: Any, path: str) -> dict[str, Any]:
    """Like ``info_of``, but raise FileNotFoundError if nothing is there."""
    file_system.invalidate_cache()
    try:
        return dict(file_system.info(path))
    except FileNotFoundError:
        # FTP's file system reports an empty root when the server closes the connection instead of listing it.
        if has_ended(file_system):
            raise ConnectionResetError(errno.ECONNRESET, "the connection has ended") from None
        _confirm_nothing_by_ftp(file_system, path)
        raise


def _confirm_nothing_by_ftp(file_system: Any, path: str) -> None:
    """Raise unless the FTP server confirms that nothing is there: fsspec takes a failed listing for an empty one."""
    mlsd = getattr(getattr(file_system, "ftp", None), "mlsd", None)
    if mlsd is None:
        return
    directory, name = posixpath.split("/" + path.strip("/"))
    try:
        names = [found.lstrip("/") for found, _ in mlsd(directory)]
    except Exception as error:
        if str(error).startswith(_NOTHING_BY_FTP):
            return
        if _name(error) == "ftplib.error_temp":  # only a listing is repeated
            raise ConnectionAbortedError(errno.ECONNABORTED, str(error)) from error
        raise
    if name in names:
        raise ConnectionAbortedError(
            errno.ECONNABORTED, "the server listed nothing at first, but lists it now"
        )


def children_of(file_system: Any, path: str) -> list[dict[str, Any]]:
    """Return what the file system tells about each thing right below *path* now; nothing if no directory is there."""
    file_system.invalidate_cache()
    try:
        found = [dict(each) for each in file_system.ls(path, detail=True)]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    found = [each for each in found if each["name"].strip("/") != path.strip("/")]
    names = {posixpath.basename(each["name"].rstrip("/")) for each in found}
    if names <= {posixpath.basename(path.rstrip("/"))}:  # a file is listed as itself; by FTP, as in itself
        here = info_of(file_system, path)  # it fails if the connection has ended
        if here is None or here.get("type") == "file":
            return []
        if not found:
            _confirm_empty_by_ftp(file_system, path)
    return found


def _confirm_empty_by_ftp(file_system: Any, path: str) -> None:
    """Raise if FTP's server lists something: fsspec takes a listing that broke off for an empty one."""
    mlsd = getattr(getattr(file_system, "ftp", None), "mlsd", None)
    if mlsd is not None and any(facts.get("type") not in ("cdir", "pdir") for _, facts in mlsd(path)):
        raise ConnectionAbortedError(
            errno.ECONNABORTED, "the server listed nothing at first, but lists it now"
        )


def modified_in(info: dict[str, Any]) -> float | None:
    """Return when a file was written, in seconds of Unix time, if *info* tells."""
    for key in _MODIFIED:
        told = info.get(key)
        if isinstance(told, datetime):
            return (told if told.tzinfo else told.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(told, (int, float)) and not isinstance(told, bool):
            return told / 1000 if key == "modificationTime" else float(told)
        if isinstance(told, str):
            with suppress(ValueError):
                return _as_datetime(told).timestamp()
    return None


def _as_datetime(text: str) -> datetime:
    """Read FTP's way of writing a time (RFC 3659, in UTC), ISO's, or HTTP's."""
    if re.fullmatch(r"[0-9]{14}(\.[0-9]+)?", text):
        return datetime.strptime(text[:14], "%Y%m%d%H%M%S").replace(tzinfo=timezone.utc)
    try:
        read = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        read = parsedate_to_datetime(text)
    return read if read.tzinfo else read.replace(tzinfo=timezone.utc)


def mode_of(file_system: Any, path: str) -> int | None:
    """Return the permission bits of a file; None if it does not exist, or the file system has none."""
    look = getattr(getattr(file_system, "ftp", None), "stat", None)  # SFTP's info does not contain the mode
    try:
        mode = look(path).st_mode if look else info_of_file(file_system, path).get("mode")
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if isinstance(mode, int) else None


def set_mode(file_system: Any, path: str, mode: int) -> None:
    """Set a file's permission bits, if the file system supports it; only a lost connection is an error."""
    change = getattr(file_system, "chmod", None) or getattr(getattr(file_system, "ftp", None), "chmod", None)
    try:
        if change is not None:
            change(path, mode)
    except Exception as error:
        if marks_lost(error):
            raise


def version_in(info: dict[str, Any]) -> list[Any]:
    """Return the values in *info* that change with a file's content, unlike the time of the last access."""
    return [info.get(key) for key in _VERSION]


def remove_file(file_system: Any, path: str) -> None:
    """Remove one file."""
    try:
        file_system.rm_file(path)
    except NotImplementedError:
        if glob.has_magic(path):
            raise
        file_system.rm(path)  # the only one that some have


def remove_empty_directory(file_system: Any, path: str) -> None:
    """Remove a directory if it is empty: some ``rmdir``s do not check that, such as Arrow's."""
    file_system.invalidate_cache()
    if all(name.strip("/") == path.strip("/") for name in file_system.ls(path, detail=False)):
        file_system.rmdir(path)


def end_connection(file_system: Any) -> None:
    """Close the client inside *file_system*: fsspec has no method for that, and paramiko's client keeps a thread (B2).

    FTP's is closed when the file system is freed, but a traceback in a reference cycle can delay that for long.
    """
    with suppress(Exception):
        client = getattr(file_system, "client", None)  # of SFTP; of WebDAV it has one itself
        client = client or getattr(file_system, "ftp", None)
        close = getattr(getattr(client, "http", client), "close", None)
        if callable(close):
            close()


def end_half_made(error: BaseException) -> None:
    """Like ``end_connection``, for a file system whose creation raised *error*: only the traceback refers to it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if isinstance(made, fsspec.spec.AbstractFileSystem):
            end_connection(made)


def bound_waiting(file_system: Any, seconds: float) -> None:
    """Make calls fail in which nothing moves for *seconds*; over SFTP, they would otherwise never end (B2)."""
    line: Any = getattr(getattr(file_system, "ftp", None), "sock", None)
    if hasattr(line, "gettimeout") and line.gettimeout() is None:
        line.settimeout(seconds)


def has_ended(file_system: Any) -> bool:
    """Return whether the idle connection inside *file_system* is known to have ended."""
    nothing = object()
    line = getattr(getattr(file_system, "ftp", None), "sock", nothing)
    if isinstance(line, socket.socket):
        return _is_readable(line)
    return line is None or getattr(line, "closed", False) is True  # of SFTP, it is paramiko's channel


def _is_readable(line: socket.socket) -> bool:
    """Return whether the server has sent anything unasked: a goodbye, or the end. The data itself is lost."""
    try:
        stall_timeout = line.gettimeout()
        line.settimeout(0)
        try:
            line.recv(1)
        finally:
            line.settimeout(stall_timeout)
    except OSError as error:
        # Not for TLS: readable bytes may belong to the protocol itself.
        return not isinstance(error, BlockingIOError) and type(error).__name__ != "SSLWantReadError"
    return True


def marks_lost(error: BaseException | None) -> bool:
    """Return whether *error*, or one of its causes, means that the connection is lost or out of step."""
    seen = set()
    while error is not None and id(error) not in seen:
        if _is_of_lost(error):
            return True
        seen.add(id(error))
        error = _what_led_to(error)
    return False


def _what_led_to(error: BaseException) -> BaseException | None:
    # httpcore re-raises, "from None", its error that was raised from the system's error.
    if error.__cause__ is None and error.__suppress_context__ and not _name(error).startswith("httpcore."):
        return None
    return error.__cause__ or error.__context__


def _is_of_lost(error: BaseException) -> bool:
    if isinstance(error, (EOFError, ConnectionError, TimeoutError)):
        return True
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, OSError) and error.errno in _LOST:
        return True
    name = _name(error)
    return name in _LOST_BY_NAME or (name == "ftplib.error_temp" and str(error).startswith(_LOST_BY_FTP))


def _name(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__name__}"


@contextmanager
def translating(stage: str, location: Location) -> Iterator[None]:
    """Translate errors into StoreError, except the FileNotFoundError of a read."""
    try:
        yield
    except StoreError:
        raise
    except Exception as raised:
        error = location.presentable(raised)
        if isinstance(error, NotImplementedError):
            advice = f"{type(error).__name__}: this file system does not support the operation; save to another one."
            raise StoreError.during(stage, location.url, error, advice) from error
        if stage == "read" and isinstance(error, FileNotFoundError):
            if error is raised:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location.url) from error
        raise StoreError.during(stage, location.url, error) from error
