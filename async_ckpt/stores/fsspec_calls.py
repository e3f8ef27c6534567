"""Calls on a file system of which only fsspec's interface is known, where fsspec's own helpers would hide an error.

Guarantees: what cannot be told is an error, never "there is nothing"; names are taken literally; what is not
empty is not removed as a directory; within ``translating``, errors are ``StoreError``. What is known of single file
systems is here: where FTP's and SFTP's keep their connection, and how it ends.

What does not belong here: which calls, and in which order.
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

# What file systems call the things that change with a file's content.
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

# Beyond what Python itself takes for a ConnectionError or a TimeoutError.
_LOST = frozenset({errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ENOTCONN})
# By name, for nothing is imported for it. An answer that fits no question was meant for another.
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
# The server hangs up; a connection for data cannot be made. Not 426, it broke: a full disk is answered so, too.
_LOST_BY_FTP = ("421", "425")
# There is no such directory; the server has no such command, and fsspec has done without.
_NOTHING_BY_FTP = ("550", "500", "501", "502", "504")


def info_of(file_system: Any, path: str) -> dict[str, Any] | None:
    """Return what the file system tells about *path* now; None if nothing is there."""
    try:
        return info_of_file(file_system, path)
    except FileNotFoundError:
        return None


def info_of_file(file_system: Any, path: str) -> dict[str, Any]:
    """Return the same; raise FileNotFoundError if nothing is there."""
    file_system.invalidate_cache()
    try:
        return dict(file_system.info(path))
    except FileNotFoundError:
        # FTP's takes the root for empty when the server hangs up instead of listing it.
        if has_ended(file_system):
            raise ConnectionResetError(errno.ECONNRESET, "the connection has ended") from None
        _confirm_nothing_by_ftp(file_system, path)
        raise


def _confirm_nothing_by_ftp(file_system: Any, path: str) -> None:
    """Raise if FTP's server does not say that nothing is there: fsspec takes a listing that fails for an empty one."""
    mlsd = getattr(getattr(file_system, "ftp", None), "mlsd", None)
    if mlsd is None:
        return
    directory, name = posixpath.split("/" + path.strip("/"))
    try:
        names = [found.lstrip("/") for found, _ in mlsd(directory)]
    except Exception as error:
        if str(error).startswith(_NOTHING_BY_FTP):
            return
        if _name(error) == "ftplib.error_temp":  # it is but a listing that is asked for again
            raise ConnectionAbortedError(errno.ECONNABORTED, str(error)) from error
        raise
    if name in names:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the server listed nothing, and now lists it")


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
        here = info_of(file_system, path)  # which fails where the connection has ended
        if here is None or here.get("type") == "file":
            return []
        if not found:
            _confirm_empty_by_ftp(file_system, path)
    return found


def _confirm_empty_by_ftp(file_system: Any, path: str) -> None:
    """Raise if FTP's server lists something: fsspec takes a listing that broke off for an empty one."""
    mlsd = getattr(getattr(file_system, "ftp", None), "mlsd", None)
    if mlsd is not None and any(facts.get("type") not in ("cdir", "pdir") for _, facts in mlsd(path)):
        raise ConnectionAbortedError(errno.ECONNABORTED, "the server listed nothing, and now lists it")


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
    """Return the permission bits of a file; None if it is not there, or the file system does not tell of any."""
    look = getattr(getattr(file_system, "ftp", None), "stat", None)  # of SFTP, whose info leaves the mode out
    try:
        mode = look(path).st_mode if look else info_of_file(file_system, path).get("mode")
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if isinstance(mode, int) else None


def set_mode(file_system: Any, path: str, mode: int) -> None:
    """Give a file these permission bits, where the file system lets that be done; only a lost connection fails."""
    change = getattr(file_system, "chmod", None) or getattr(getattr(file_system, "ftp", None), "chmod", None)
    try:
        if change is not None:
            change(path, mode)
    except Exception as error:
        if marks_lost(error):
            raise


def version_in(info: dict[str, Any]) -> list[Any]:
    """Return what of *info* changes with a file's content: not, as over SFTP, when it was read last."""
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
    """Remove a directory, unless there is something in it: not every ``rmdir`` looks, Arrow's for one."""
    file_system.invalidate_cache()
    if all(name.strip("/") == path.strip("/") for name in file_system.ls(path, detail=False)):
        file_system.rmdir(path)


def end_connection(file_system: Any) -> None:
    """Close the client inside *file_system*: fsspec has no call for it, and paramiko's keeps a thread (B2).

    FTP's would be closed as the file system is lost, but a traceback in a cycle can put that off for long.
    """
    with suppress(Exception):
        client = getattr(file_system, "client", None)  # of SFTP; of WebDAV it has one itself
        client = client or getattr(file_system, "ftp", None)
        close = getattr(getattr(client, "http", client), "close", None)
        if callable(close):
            close()


def end_half_made(error: BaseException) -> None:
    """Do the same where *error* ended the making of a file system: only its traceback still leads to it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = frame.f_locals.get("self")
        if isinstance(made, fsspec.spec.AbstractFileSystem):
            end_connection(made)


def bound_waiting(file_system: Any, seconds: float) -> None:
    """Let a call fail in which nothing moves for *seconds*, where it would wait for ever, as over SFTP (B2)."""
    line: Any = getattr(getattr(file_system, "ftp", None), "sock", None)
    if hasattr(line, "gettimeout") and line.gettimeout() is None:
        line.settimeout(seconds)


def has_ended(file_system: Any) -> bool:
    """Return whether the connection inside *file_system*, on which no call is under way, is seen to have ended."""
    nothing = object()
    line = getattr(getattr(file_system, "ftp", None), "sock", nothing)
    if isinstance(line, socket.socket):
        return _is_readable(line)
    return line is None or getattr(line, "closed", False) is True  # of SFTP, it is paramiko's channel


def _is_readable(line: socket.socket) -> bool:
    """Return whether the server has said anything unasked: a goodbye or the end. What it was is lost."""
    try:
        patience = line.gettimeout()
        line.settimeout(0)
        try:
            line.recv(1)
        finally:
            line.settimeout(patience)
    except OSError as error:
        # Of TLS, no peeking tells: what can be read there need not be for us.
        return not isinstance(error, BlockingIOError) and type(error).__name__ != "SSLWantReadError"
    return True


def marks_lost(error: BaseException | None) -> bool:
    """Return whether *error*, or what led to it, says that a connection is gone, or that it has lost step."""
    seen = set()
    while error is not None and id(error) not in seen:
        if _is_of_lost(error):
            return True
        seen.add(id(error))
        error = _what_led_to(error)
    return False


def _what_led_to(error: BaseException) -> BaseException | None:
    # httpcore raises again, "from None", what it has raised from the system's own error.
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
    """Raise what goes wrong as a StoreError; FileNotFoundError of a read is raised as it is."""
    try:
        yield
    except StoreError:
        raise
    except Exception as raised:
        error = location.presentable(raised)
        if isinstance(error, NotImplementedError):
            advice = f"{type(error).__name__}: this file system cannot do that; save to another."
            raise StoreError.during(stage, location.url, error, advice) from error
        if stage == "read" and isinstance(error, FileNotFoundError):
            if error is raised:
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location.url) from error
        raise StoreError.during(stage, location.url, error) from error
