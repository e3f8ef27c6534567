"""The journal of this process's open uploads: if it is killed, the next process aborts them.

Guarantees: a journal is locked before anything is written to it, and while its owner lives; hence an upload in an
abandoned journal has no owner any more (D2). Trouble with journals never fails a save.

A journal is a file of JSON lines in the user's state directory, readable only by the user. It contains endpoint,
bucket, key and id of multipart uploads, no credentials; it is removed when no upload is open. A line begins with a line
break, as the previous line may have been cut off. All methods block.

What does not belong here: aborting uploads, and recognizing abandoned files (`locking`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import is_leftover, temporary_name
from async_ckpt.stores.locking import hold_fresh, is_abandoned

__all__ = ["Entry", "Journal", "state_directory"]

_log = logging.getLogger("async_ckpt.stores.s3.journal")

_FORGOTTEN_SECONDS = 30 * 24 * 3600.0  # by then, the sweep by age or the bucket's own rule has been there
_CREATE_ATTEMPTS = 10
_LONGEST_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One open multipart upload."""

    endpoint: str
    bucket: str
    key: str
    upload_id: str


def state_directory() -> Path | None:
    """Return the directory of journals, by the XDG specification; ``None`` if the user has no home."""
    base = Path(os.environ.get("XDG_STATE_HOME") or "")
    if not base.is_absolute():  # to be ignored, says the specification
        base = Path(os.path.expanduser("~"), ".local", "state")
    return base / "async_ckpt" / "uploads" if base.is_absolute() else None


class Journal:
    """The journal of one store.

    Args:
        directory: the directory of journals; created when first needed. ``None`` keeps no journal.
        disk: the system calls.
    """

    def __init__(self, directory: Path | None, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = disk or Disk()
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._fd: int | None = None
        self._open: dict[Entry, None] = {}

    def opened(self, entry: Entry) -> None:
        """Record that *entry* is open."""
        with self._lock, _debugging("write"):
            self._open[entry] = None
            if self._fd is not None:
                self._write(self._fd, "open", [entry])
            elif self._directory is not None:
                self._write(self._create(self._directory), "open", self._open)

    def ended(self, entry: Entry) -> None:
        """Record that *entry* has ended; the file is removed with the last one."""
        with self._lock, _debugging("write"):
            self._open.pop(entry, None)
            if self._fd is not None:
                with _debugging("write"):  # a full disk, and yet it can be removed
                    self._write(self._fd, "end", [entry])
                if not self._open:
                    self._remove()

    def close(self) -> None:
        """Close the file; it stays if an upload could not be aborted."""
        with self._lock, _debugging("close"):
            if self._fd is not None and not self._open:
                self._remove()
            elif self._fd is not None:
                fd, self._fd = self._fd, None
                self._disk.close(fd)
            self._open.clear()

    def abandoned(self) -> list[tuple[Path, list[Entry]]]:
        """Return the open uploads of dead processes, by journal."""
        found = []
        with _debugging("read"):
            for name in sorted(filter(is_leftover, self._names())):
                path = Path(self._directory or "", name)
                if self._fd is None or path != self._path:
                    with _debugging("read"), self._taken(path) as fd:
                        if fd is not None:
                            found.append((path, _read(fd).still_open))
        return found

    def settle(self, path: Path, entries: Iterable[Entry]) -> None:
        """Record that *entries* of the abandoned journal *path* have ended; remove it if none is left."""
        with _debugging("write"), self._taken(path) as fd:
            if fd is None:
                return
            with _debugging("write"):  # a full disk, and yet it can be removed
                self._write(fd, "end", entries)
            content = _read(fd)
            forgotten = time.time() - self._disk.fstat(fd).st_ctime > _FORGOTTEN_SECONDS
            if forgotten or (content.is_understood and not set(content.still_open) - set(entries)):
                self._disk.unlink(str(path))

    def _names(self) -> list[str]:
        try:
            return [] if self._directory is None else self._disk.names(str(self._directory))
        except FileNotFoundError:  # no process has had one
            return []

    def _create(self, directory: Path) -> int:
        """Create the file, and lock it before a sweeper takes it for abandoned."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for _ in range(_CREATE_ATTEMPTS):
            path = directory / temporary_name()
            fd = self._disk.create(str(path))
            self._path, self._fd = path, fd
            try:
                held = hold_fresh(self._disk, fd)
            except OSError:
                self._remove()
                raise
            if held:
                return fd
            self._remove()
        raise OSError("a new file there is removed at once")

    def _remove(self) -> None:
        assert self._fd is not None
        assert self._path is not None
        fd, self._fd = self._fd, None
        try:
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(str(self._path))
        finally:
            self._disk.close(fd)

    def _write(self, fd: int, event: str, entries: Iterable[Entry]) -> None:
        lines = [b"\n" + json.dumps({"event": event, **asdict(entry)}).encode() for entry in entries]
        self._disk.write(fd, [memoryview(b"".join(lines))], self._disk.fstat(fd).st_size)

    @contextlib.contextmanager
    def _taken(self, path: Path) -> Iterator[int | None]:
        """Lock the journal at *path*; ``None`` if its owner may live, or it is no journal of this user's."""
        fd = self._disk.open_existing(str(path))
        try:
            found = self._disk.fstat(fd)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            yield fd if ours and is_abandoned(self._disk, fd, path.name) else None
        finally:
            self._disk.close(fd)


@contextlib.contextmanager
def _debugging(what: str) -> Iterator[None]:
    """Log all errors instead of raising them: without a journal, uploads are still swept by age."""
    try:
        yield
    except Exception as error:
        _log.debug("cannot %s the journal of uploads: %s", what, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """What a journal says.

    Attributes:
        still_open: the uploads without an end.
        is_understood: whether all lines are of known kinds; a later version may write others.
    """

    still_open: list[Entry]
    is_understood: bool


def _read(fd: int) -> _Content:
    still: dict[Entry, None] = {}
    is_understood = True
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        while line := file.readline(_LONGEST_LINE_BYTES):
            event, entry = _parsed(line)
            if event not in ("", "open", "end"):
                is_understood = False
            elif entry is not None and event == "open":
                still[entry] = None
            elif entry is not None:
                still.pop(entry, None)
    return _Content(still_open=list(still), is_understood=is_understood)


def _parsed(line: bytes) -> tuple[str, Entry | None]:
    """Return the event and the upload in *line*; nothing if it is not valid."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # cut off, or none of ours
        return "", None
    if not isinstance(values, dict):
        return "", None
    texts = {field.name: values.get(field.name) for field in fields(Entry)}
    known = {name: text for name, text in texts.items() if text and isinstance(text, str)}
    return str(values.get("event") or ""), Entry(**known) if known.keys() == texts.keys() else None
