"""What a load tells of its progress."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.format.reading.progress import Progress
from async_ckpt.testing import ManualClock

MIB = 1 << 20


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal, and no rank."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def load(progress: Progress, clock: ManualClock, *, seconds: float) -> None:
    """Let a hundred pieces come."""
    with progress:
        progress.expect(100 * MIB)
        for _ in range(100):
            clock.advance(seconds / 100)
            progress.moved(MIB)


@pytest.mark.parametrize(
    ("wanted", "seconds", "tells"),
    [(None, 1.0, False), (None, 9.0, True), (False, 9.0, False), (True, 0.1, True)],
)
def test_a_bar_where_it_is_wanted(
    terminal: Terminal, wanted: bool | None, seconds: float, tells: bool
) -> None:
    """A bar with bytes, rate and name comes once a load takes long, at once if asked for, and else not at all."""
    clock = ManualClock()
    load(Progress(wanted, "s3://bucket/x.ckpt", clock=clock, stream=terminal), clock, seconds=seconds)
    assert ("x.ckpt" in terminal.getvalue()) is tells
    assert ("100M" in terminal.getvalue()) is tells


def test_nobody_watches(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several processes share a terminal the first one alone tells, and into a file nobody does."""
    clock = ManualClock()
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(Progress(None, "x.ckpt", clock=clock, stream=terminal), clock, seconds=60)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    load(Progress(None, "x.ckpt", clock=clock, stream=terminal), clock, seconds=60)
    assert terminal.getvalue() == ""


def test_closed_standard_error(tmp_path: Path) -> None:
    """A load does without telling where standard error is closed."""
    with open(tmp_path / "stderr", "w") as closed:
        pass
    load(Progress(None, "x.ckpt", clock=ManualClock(), stream=closed), ManualClock(), seconds=60)


def test_lines_without_tqdm(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without tqdm, a load that was asked to tell does so in the log, now and then; the others are silent."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    caplog.set_level(logging.INFO)
    clock = ManualClock()
    load(Progress(True, "x.ckpt", clock=clock, stream=terminal), clock, seconds=35)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[-1] == "loading x.ckpt: 100 of 100 MiB, 3 MiB/s, 0 s left"
    load(Progress(None, "x.ckpt", clock=clock, stream=terminal), clock, seconds=35)
    assert (len(caplog.records), terminal.getvalue()) == (4, "")


def test_a_failed_load_closes_its_bar(terminal: Terminal) -> None:
    """A bar that is shown when the load fails ends where it was."""
    clock = ManualClock()

    def fail() -> Any:
        with Progress(True, "x.ckpt", clock=clock, stream=terminal) as progress:
            progress.expect(MIB)
            clock.advance(1)
            progress.moved(1024)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert "1.00M" in terminal.getvalue()


class Gone(Terminal):
    """A terminal whose other end has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize("wanted", [None, True])
def test_a_terminal_that_is_gone(terminal: Terminal, wanted: bool | None) -> None:
    """A load does not fail because its bar can be drawn no more."""
    clock = ManualClock()
    load(Progress(wanted, "x.ckpt", clock=clock, stream=Gone()), clock, seconds=9.0)
