"""The journal of open uploads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from async_ckpt.stores.disk import Disk
from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.s3.journal import Entry, Journal, state_directory
from async_ckpt.testing import FaultyDisk
from tests.support import PATIENCE_SECONDS, python, start_python
from tests.unit.stores.test_leftovers import dead_pid


@pytest.fixture(autouse=True)
def _journals_are_left(tmp_path: Path) -> Iterator[None]:
    """Remove what a test has left for others to find."""
    yield
    shutil.rmtree(tmp_path)


def entry(number: int, bucket: str = "bucket") -> Entry:
    """Return an upload."""
    return Entry(endpoint="https://s3", bucket=bucket, key=f"{number}.ckpt", upload_id=str(number))


def test_a_journal_of_the_living_is_left_alone(tmp_path: Path) -> None:
    """While its owner lives, a journal tells no one anything; closed with nothing open, it is gone."""
    mine, other = Journal(tmp_path), Journal(tmp_path)
    mine.opened(entry(1))
    assert other.abandoned() == []
    mine.ended(entry(1))
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_open_is_found(tmp_path: Path) -> None:
    """What a journal has open when it is let go of, and only that, is found, until it is settled."""
    mine, other = Journal(tmp_path), Journal(tmp_path)
    for number in range(3):
        mine.opened(entry(number))
    mine.ended(entry(1))
    mine.close()
    ((path, found),) = other.abandoned()
    assert found == [entry(0), entry(2)]
    other.settle(path, [entry(0)])
    assert other.abandoned() == [(path, [entry(2)])]
    other.settle(path, [entry(2)])
    assert list(tmp_path.iterdir()) == []


def test_the_journal_of_a_killed_process(tmp_path: Path) -> None:
    """A process that is killed leaves its journal to others."""
    code = f"""
        import os, signal
        from pathlib import Path
        from async_ckpt.stores.s3.journal import Entry, Journal
        Journal(Path({str(tmp_path)!r})).opened({entry(1)!r})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    python(code)
    journal = Journal(tmp_path)
    ((path, found),) = journal.abandoned()
    assert found == [entry(1)]
    journal.settle(path, found)


def test_only_the_user_may_read_it(tmp_path: Path) -> None:
    """Folder and file are the user's alone."""
    folder = tmp_path / "new" / "uploads"
    journal = Journal(folder)
    journal.opened(entry(1))
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.ended(entry(1))


class OneHost(Disk):
    """A disk whose locks are known to be this kernel's alone, or not.

    Args:
        yes: which of them.
    """

    def __init__(self, yes: bool = True) -> None:
        self._yes = yes

    def is_of_one_host(self, fd: int) -> bool:
        """Answer as told."""
        return self._yes


def test_a_sweeper_in_between(tmp_path: Path) -> None:
    """A sweeper that finds the file before its owner has locked it never takes what is written later for abandoned."""
    sweeper = Journal(tmp_path)

    class Overtaken(Disk):
        times = 0

        def lock(self, fd: int) -> None:
            """Lock, but be too late twice: the file is gone, or it is being looked at."""
            self.times += 1
            if self.times == 1:
                ((path, found),) = sweeper.abandoned()
                sweeper.settle(path, found)
            if self.times == 2:
                with sweeper._taken(*tmp_path.iterdir()):
                    super().lock(fd)
            super().lock(fd)

    disk = Overtaken()
    mine = Journal(tmp_path, disk)
    mine.opened(entry(1))
    assert disk.times == 3
    assert sweeper.abandoned() == []
    mine.close()
    ((_, found),) = sweeper.abandoned()
    assert found == [entry(1)]


def test_without_locks_the_process_id_tells(tmp_path: Path) -> None:
    """Where files cannot be locked, or perhaps only now, only a dead process's journal is taken for abandoned (D2)."""
    for number in (errno.ENOTSUP, errno.ENOLCK):
        mine = Journal(tmp_path, FaultyDisk({"lock": (0, number)}))
        mine.opened(entry(1))
        for disk in (FaultyDisk({"lock": (0, number)}), OneHost(False)):
            assert Journal(tmp_path, disk).abandoned() == []
        mine.ended(entry(1))
    dead = temporary_name().replace(f".{os.getpid()}.", f".{dead_pid()}.")
    (tmp_path / dead).write_bytes(line(entry(2)))
    assert Journal(tmp_path, FaultyDisk({"lock": (0, errno.ENOTSUP)})).abandoned() == [
        (tmp_path / dead, [entry(2)])
    ]


def test_a_child_keeps_no_lock(tmp_path: Path) -> None:
    """The journal of a killed process is abandoned, though a child that it had forked lives on."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from async_ckpt.stores.s3.journal import Entry, Journal
        Journal(Path({str(tmp_path)!r})).opened({entry(1)!r})
        if os.fork() == 0:
            os.read(0, 1)  # until the test has looked
            os._exit(0)
        print("forked", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = start_python(code, stdin=subprocess.PIPE)
    try:
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        ((_, found),) = Journal(tmp_path).abandoned()
        assert found == [entry(1)]
    finally:
        process.communicate("\n")


BAD = {
    "cut off": b'\n{"event": "open", "endpo',
    "no fields": b'\n{"event": "open"}\n{"event": "end"}',
    "no objects": b'\n[]\nnull\n7\n"open"\nnonsense\n\xff\xfe\x00',
    "unhashable": b'\n{"event": "open", "endpoint": [], "bucket": {}, "key": 1, "upload_id": null}',
    "deep": b"\n" + b"[" * 100_000,
    "long": b"\n" + b'"' * 1_000_000,
}


def line(of: Entry, event: str = "open") -> bytes:
    """Return a line as a journal has it."""
    return b"\n" + json.dumps({"event": event, **asdict(of)}).encode()


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_is_passed_over(tmp_path: Path, bad: bytes) -> None:
    """What was cut off in the midst of a line, or is not ours, does no harm, and hides no other line."""
    path = tmp_path / temporary_name()
    path.write_bytes(line(entry(1)) + bad + line(entry(2)))
    (tmp_path / "notes.txt").write_text("not ours")
    journal = Journal(tmp_path, OneHost())
    assert journal.abandoned() == [(path, [entry(1), entry(2)])]
    journal.settle(path, [entry(1), entry(2)])
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


def test_a_later_version(tmp_path: Path) -> None:
    """What a later version writes is read as far as it is known, and its file is left to that version."""
    path = tmp_path / temporary_name()
    more = {"event": "open", "region": "mars", **asdict(entry(1))}
    path.write_text("\n" + json.dumps(more) + '\n{"event": "paused", "id": 3}')
    journal = Journal(tmp_path, OneHost())
    assert journal.abandoned() == [(path, [entry(1)])]
    journal.settle(path, [entry(1)])
    assert journal.abandoned() == [(path, [])]


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "unreadable", "another user's"])
def test_what_is_no_journal_is_passed_over(tmp_path: Path, kind: str) -> None:
    """Something else of a journal's name neither fails nor holds up who looks, and hides no journal."""
    path = tmp_path / temporary_name()
    path.write_bytes(line(entry(1)))
    if kind == "unreadable" and os.geteuid():
        path.chmod(0)
    elif kind == "another user's" and os.geteuid() == 0:
        os.chown(path, 1234, -1)
    else:
        path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path)
    good = tmp_path / temporary_name()
    good.write_bytes(line(entry(2)))
    journal = Journal(tmp_path, OneHost())
    assert journal.abandoned() == [(good, [entry(2)])]
    journal.settle(path, [])


@pytest.mark.parametrize(
    "call", ["create", "lock", "write", "fstat", "unlink", "close", "names", "open_existing"]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_fails(tmp_path: Path, call: str, number: int) -> None:
    """Where nothing can be read or written, uploads go on without a journal."""
    (tmp_path / temporary_name()).write_bytes(line(entry(2)))
    disk = FaultyDisk({call: (0, number)}, after=call == "close")
    journal = Journal(tmp_path, disk)
    journal.opened(entry(1))
    for path, found in journal.abandoned():
        journal.settle(path, found)
    journal.ended(entry(1))
    journal.close()
    assert disk.open_descriptors == 0


def test_a_disk_that_was_full(tmp_path: Path) -> None:
    """A line that was cut off hides no other, and an upload that was opened before there was a file is in it."""
    mine = Journal(tmp_path, FaultyDisk({"create": (1, errno.ENOSPC)}))
    for number in range(2):
        mine.opened(entry(number))
    (path,) = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(b'\n{"event": "op')
    mine.opened(entry(2))
    mine.close()
    ((_, found),) = Journal(tmp_path, OneHost()).abandoned()
    assert found == [entry(0), entry(1), entry(2)]


@pytest.mark.parametrize("place", ["file/uploads", None])
def test_no_journal_is_no_failure(tmp_path: Path, place: str | None) -> None:
    """Where there is no place for it, uploads go on without a journal."""
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / place if place else None)
    journal.opened(entry(1))
    journal.ended(entry(1))
    assert journal.abandoned() == []
    journal.close()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Journals are in the user's state directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_directory() == tmp_path / "async_ckpt" / "uploads"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_directory() == tmp_path / ".local" / "state" / "async_ckpt" / "uploads"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says the specification
    assert state_directory() == tmp_path / ".local" / "state" / "async_ckpt" / "uploads"
    monkeypatch.setenv("HOME", "relative")  # a home that is none makes no directory here
    assert state_directory() is None
