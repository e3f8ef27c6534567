"""Which uploads this process has open, written down for the next one: a killed process cannot abort its own.

Guarantees: a journal is locked while its owner lives, and only this host's are read, hence an upload found in
an abandoned one is nobody's any more (D2). Failing to write or read is no failure of a save.

A journal is a file of JSON lines in the user's state directory, readable by the user alone. It holds endpoint,
bucket, key and id of multipart uploads, no credentials; it is gone once no upload is open. All methods block.

What does not belong here: aborting.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from async_ckpt.stores.leftovers import is_leftover, is_of_this_host, owner_is_dead, temporary_name

__all__ = ["Entry", "Journal", "state_directory"]

_log = logging.getLogger("async_ckpt.stores.s3.journal")

_FORGOTTEN_SECONDS = 30 * 24 * 3600.0  # by then, the sweep by age or the bucket's own rule has been there


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One open multipart upload."""

    endpoint: str
    bucket: str
    key: str
    upload_id: str


def state_directory() -> Path:
    """Return where journals are, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(base) / "async_ckpt" / "uploads"


class Journal:
    """The journal of one store.

    Args:
        directory: where journals are; made when first needed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._fd: int | None = None
        self._open: set[Entry] = set()

    def opened(self, entry: Entry) -> None:
        """Write down that *entry* is open."""
        with self._lock, _debugging("write"):
            self._open.add(entry)
            if self._fd is None:
                self._create()
            assert self._fd is not None
            os.write(self._fd, _line("open", entry))

    def ended(self, entry: Entry) -> None:
        """Write down that *entry* is no more; the file goes with the last one."""
        with self._lock, _debugging("write"):
            self._open.discard(entry)
            if self._fd is not None:
                os.write(self._fd, _line("end", entry))
                if not self._open:
                    self._remove()

    def close(self) -> None:
        """Let go of the file; it stays if an upload could not be aborted."""
        with self._lock, _debugging("close"):
            if self._fd is not None and not self._open:
                self._remove()
            elif self._fd is not None:
                os.close(self._fd)
                self._fd = self._path = None
            self._open.clear()

    def abandoned(self) -> list[tuple[Path, list[Entry]]]:
        """Return what dead processes of this host have left open, by the file that says so."""
        found = []
        with _debugging("read"):
            for name in sorted(os.listdir(self._directory)):
                path = self._directory / name
                if is_leftover(name) and is_of_this_host(name) and path != self._path:
                    with _debugging("read"), _taken(path) as fd:
                        if fd is not None:
                            found.append((path, _read(fd)))
        return found

    def settle(self, path: Path, entries: Iterable[Entry]) -> None:
        """Write down that *entries* of the abandoned *path* are no more; remove it if none is left."""
        with _debugging("write"), _taken(path) as fd:
            if fd is None:
                return
            for entry in entries:
                os.write(fd, _line("end", entry))
            forgotten = time.time() - os.fstat(fd).st_ctime > _FORGOTTEN_SECONDS
            if forgotten or not _read(fd):
                path.unlink()

    def _create(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / temporary_name()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._path, self._fd = path, fd
        with contextlib.suppress(OSError):  # a file system without locks: the process id must tell
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _remove(self) -> None:
        assert self._fd is not None
        assert self._path is not None
        fd, path = self._fd, self._path
        self._fd = self._path = None
        try:
            path.unlink(missing_ok=True)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[int | None]:
    """Hold the lock of *path*; None if its owner lives."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead = True
        except BlockingIOError:
            dead = False
        except OSError:
            dead = owner_is_dead(path.name)
        yield fd if dead else None
    finally:
        os.close(fd)


@contextlib.contextmanager
def _debugging(what: str) -> Iterator[None]:
    """Log failures only: without a journal, the sweep by age remains."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        _log.debug("cannot %s the journal of uploads: %s", what, error)


def _line(event: str, entry: Entry) -> bytes:
    return json.dumps({"event": event, **asdict(entry)}).encode() + b"\n"


def _read(fd: int) -> list[Entry]:
    """Return the entries that are open, of those lines that are whole."""
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        lines = file.read().splitlines()
    still: dict[Entry, None] = {}
    for line in lines:
        try:
            values = json.loads(line)
            event = values.pop("event")
            entry = Entry(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if event == "open":
            still[entry] = None
        else:
            still.pop(entry, None)
    return list(still)
