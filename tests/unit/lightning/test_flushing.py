"""What a person sees of a wait for pending checkpoints, and how it is given up."""

from __future__ import annotations

import errno
import io
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.lightning.flushing import give_up, wait_with_progress
from async_ckpt.telemetry.meter import Meter
from async_ckpt.testing import Fault, Gate, ManualClock
from tests.support import PATIENCE_SECONDS, Harness, gated, number_at, python, reached, state

FOR_EVER = 1e9


class Terminal(io.StringIO):
    """A standard error that somebody watches, and who does something once a text has appeared."""

    def __init__(self, text: str, then: Callable[[], object]) -> None:
        super().__init__()
        self._text = text
        self._then = then

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._text in text:
            self._then()
        return written


class Metered(Harness):
    """A harness whose service is watched by a meter."""

    def __init__(self, *faults: Fault, **options: Any) -> None:
        self.meter = Meter()
        super().__init__(*faults, observer=self.meter, **options)

    def wait(self, **options: Any) -> float | None:
        """Wait with a clock on which every look at it is five seconds later."""
        seconds = count(0, 5)
        defaults: dict[str, Any] = {"timeout": FOR_EVER, "clock": lambda: float(next(seconds))}
        return wait_with_progress(self.service, self.meter, **{**defaults, **options})

    def __enter__(self) -> Metered:
        return self


@pytest.fixture(autouse=True)
def _first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def when_logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[int, Gate], list[str]]]:
    """Return a function that has a gate opened at the n-th line of the log, and returns the lines."""
    logger = logging.getLogger("async_ckpt.lightning.flushing")
    filters: list[Any] = []

    def watch(number: int, gate: Gate) -> list[str]:
        lines: list[str] = []

        def see(record: logging.LogRecord) -> bool:
            lines.append(record.getMessage())
            if len(lines) == number:
                gate.open()
            return True

        filters.append(see)
        logger.addFilter(see)
        return lines

    yield watch
    for see in filters:
        logger.removeFilter(see)


@contextmanager
def ctrl_c(handler: Any) -> Iterator[None]:
    """Let Ctrl-C do something for a while."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitors() -> list[threading.Thread]:
    """Return the threads of tqdm, which come with its first bar of a kind."""
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "TMonitor"]


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def after_the_first(wait: Callable[[], Any]) -> Any:
    """Call *wait* as Lightning does when it ends because of Ctrl-C: which it handles and then ignores."""
    with ctrl_c(signal.default_int_handler):
        try:
            press()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return wait()


def test_nothing_of_a_short_wait(capsys: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A wait that is over within a second shows nothing; it returns what is left of its limit."""
    clock = ManualClock()
    with Metered(Fault(operation="commit", delay_seconds=0.5)) as harness:
        handle = harness.service.save(state(1), tmp_path / "a.ckpt")
        assert wait_with_progress(harness.service, harness.meter, timeout=7.0, clock=clock) == 7.0
        assert handle.done()
    assert (capsys.readouterr().err, caplog.records) == ("", [])


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a terminal a longer wait is a bar with what is written, of how much, and for how many; it leaves no thread."""
    gate, hold = gated("commit")
    terminal = Terminal("waiting for 2 checkpoints", gate.open)
    monkeypatch.setattr(sys, "stderr", terminal)
    pytest.importorskip("tqdm")
    threads = _monitors()
    with Metered(hold, queue_depth=2) as harness:
        for name in ("a", "b"):
            harness.service.save(state(1, nbytes=1 << 20), tmp_path / name)
        assert harness.wait()
    assert re.search(r"waiting for 2 checkpoints: +\d+%.*/2\.00M ", terminal.getvalue())
    assert _monitors() == threads


def test_lines_where_nobody_watches(tmp_path: Path, when_logged: Any) -> None:
    """Elsewhere it is a line of the log, and another every ten seconds, with what is left."""
    gate, hold = gated("commit")
    with Metered(hold) as harness:
        harness.service.save(state(1, nbytes=3 << 20), tmp_path / "a")
        lines = when_logged(2, gate)
        assert harness.wait()
    assert re.fullmatch(
        r"waiting for 1 checkpoint, [03]\.0 of 3\.0 MiB(, [\d.]+ MiB/s, \d+ s left)?", lines[0]
    )


def test_lines_come_seldom(tmp_path: Path, when_logged: Any) -> None:
    """A line comes after a second and then one every ten."""
    gate, hold = gated("commit")
    lines: list[str] = []
    seconds = count(0, 1)

    def clock() -> float:
        now = next(seconds)
        if now == 24:
            gate.open()
        return min(float(now), 24.0)  # however long the save takes from now on

    with Metered(hold) as harness:
        harness.service.save(state(1), tmp_path / "a")
        lines = when_logged(99, gate)
        assert harness.wait(clock=clock)
    assert len(lines) == 3


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Of several processes the first alone shows that it waits."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    terminal = Terminal("waiting", lambda: None)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Metered(Fault(operation="commit", delay_seconds=0.5)) as harness:
        harness.service.save(state(1), tmp_path / "a")
        assert harness.wait()
    assert (terminal.getvalue(), caplog.records) == ("", [])


def test_deletions_are_waited_for_too(tmp_path: Path, when_logged: Any) -> None:
    """Where only a deletion is pending, the line says so."""
    gate, hold = gated("delete")
    with Metered(hold) as harness:
        harness.service.remove(tmp_path / "a")
        lines = when_logged(1, gate)
        assert harness.wait()
    assert lines[0] == "waiting for deletions"


@pytest.mark.parametrize("broken", ["closed", "gone"])
def test_it_survives_its_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str) -> None:
    """A standard error that is closed, or whose terminal has gone, costs no checkpoint."""

    def hang_up() -> None:
        raise OSError(errno.ENXIO, "the terminal is gone")

    stream = Terminal("waiting", hang_up)
    if broken == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with Metered(Fault(operation="commit", delay_seconds=0.5)) as harness:
        handle = harness.service.save(state(1), tmp_path / "a")
        assert harness.wait()
        handle.wait(0)
        assert number_at(tmp_path / "a") == 1


def test_the_limit(tmp_path: Path) -> None:
    """When the limit has passed, nothing is left of it, and the save goes on."""
    gate, hold = gated("commit")
    with Metered(hold) as harness:
        handle = harness.service.save(state(1), tmp_path / "a")
        assert harness.wait(timeout=20.0) == 0.0
        assert not handle.done()
        gate.open()
        handle.wait(PATIENCE_SECONDS)


def test_one_request_alone(tmp_path: Path) -> None:
    """A wait for one save is over when that is durable, whatever else is pending."""
    gate, hold = gated("commit", calls=[2])
    with Metered(hold, queue_depth=2, max_concurrent_saves=2) as harness:
        first = harness.service.save(state(1), tmp_path / "a")
        first.wait(PATIENCE_SECONDS)
        second = harness.service.save(state(2), tmp_path / "b")
        reached(gate)
        third = harness.service.save(state(3), tmp_path / "c")
        assert harness.wait(handle=third)
        assert (third.done(), second.done()) == (True, False)
        gate.open()


def test_failures_stay_with_their_service(tmp_path: Path) -> None:
    """The wait itself raises nothing of a failed save; whoever asks next is told (E1)."""
    with Metered(Fault(operation="commit", error=lambda: OSError("no more room"))) as harness:
        harness.service.save(state(1), tmp_path / "a")
        assert harness.wait()
        with pytest.raises(OSError, match="no more room"):
            harness.service.wait()


def test_ctrl_c_where_it_is_not_ignored(tmp_path: Path) -> None:
    """Ctrl-C during a wait is what it is everywhere, and the save goes on."""
    gate, hold = gated("commit")
    with Metered(hold) as harness:
        handle = harness.service.save(state(1), tmp_path / "a")
        main = threading.main_thread().ident
        assert main is not None
        presser = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
        looks = count()

        def clock() -> float:
            if next(looks) == 2:  # it waits from now on
                presser.start()
            return 0.0

        with ctrl_c(signal.default_int_handler):
            with pytest.raises(KeyboardInterrupt):
                wait_with_progress(harness.service, harness.meter, timeout=FOR_EVER, clock=clock)
            presser.join()
        assert not handle.done()
        gate.open()
        handle.wait(PATIENCE_SECONDS)


def test_second_ctrl_c_gives_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While a first Ctrl-C is being handled and more are ignored, one more ends the wait; then they are ignored again.

    What is given up is named and leaves nothing behind; the checkpoint before stays (D2).
    """
    gate, hold = gated("commit", calls=[2])
    terminal = Terminal("Ctrl-C gives up", press)
    monkeypatch.setattr(sys, "stderr", terminal)
    harness = Metered(hold)
    harness.service.save(state(1), tmp_path / "a").wait(PATIENCE_SECONDS)
    handle = harness.service.save(state(2), tmp_path / "b")
    reached(gate)

    def wait() -> None:
        assert harness.wait() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        give_up(harness.service)

    after_the_first(wait)
    assert handle.done()
    assert f"interrupted: these checkpoints are given up: '{tmp_path / 'b'}'" in terminal.getvalue()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert number_at(tmp_path / "a") == 1


def test_ignored_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where Ctrl-C is ignored and none is being handled, as under nohup, it stays ignored."""
    monkeypatch.setattr(sys, "stderr", Terminal("waiting", press))
    with ctrl_c(signal.SIG_IGN):
        with Metered(Fault(operation="commit", delay_seconds=0.5)) as harness:
            harness.service.save(state(1), tmp_path / "a")
            assert harness.wait()
    assert number_at(tmp_path / "a") == 1


def test_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    """A thread that waits while it handles a KeyboardInterrupt of its own does not touch the signals' handlers."""
    left: list[float | None] = []

    def wait() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            left.append(harness.wait())

    with ctrl_c(signal.SIG_IGN):
        with Metered(Fault(operation="commit", delay_seconds=0.3)) as harness:
            harness.service.save(state(1), tmp_path / "a")
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(PATIENCE_SECONDS)
    assert left
    assert left[0]


def test_a_handler_does_not_wait_for_the_save_it_interrupted(tmp_path: Path) -> None:
    """A wait in a signal handler that has interrupted a save does not wait for that one (L1)."""
    done = python(
        """
        import signal, sys, threading
        from async_ckpt import CheckpointService
        from async_ckpt.events import Accepted
        from async_ckpt.lightning.flushing import wait_with_progress
        from async_ckpt.telemetry.meter import Meter
        from tests.support import state

        meter = Meter()
        main = threading.main_thread().ident

        def observe(event):
            meter(event)
            if isinstance(event, Accepted):
                signal.pthread_kill(main, signal.SIGUSR1)

        def handle(*_):
            print(wait_with_progress(service, meter, timeout=10.0) > 5)

        signal.signal(signal.SIGUSR1, handle)
        with CheckpointService(observer=observe) as service:
            service.save(state(1), sys.argv[1])
        """,
        tmp_path / "a",
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
