"""The journal of open uploads."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from async_ckpt.stores.leftovers import temporary_name
from async_ckpt.stores.s3.journal import Entry, Journal, state_directory
from tests.support import python


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


def test_lines_that_are_no_lines(tmp_path: Path) -> None:
    """What was cut off in the midst of a line, or is not ours, does no harm."""
    path = tmp_path / temporary_name()
    path.write_bytes(b'{"event": "open"}\n[]\nnonsense\n\xff\n{"event": "open", "endpo')
    (tmp_path / "notes.txt").write_text("not ours")
    journal = Journal(tmp_path)
    assert journal.abandoned() == [(path, [])]
    journal.settle(path, [])
    assert not path.exists()


def test_no_journal_is_no_failure(tmp_path: Path) -> None:
    """Where nothing can be written, uploads go on without a journal."""
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "uploads")
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
