"""Waits for pending checkpoints, and shows the progress to the person who waits, too.

Guarantees: a short wait shows nothing; a longer one shows a bar on a terminal, or else logs a line from time to time,
on the first rank only. The waiting thread itself draws, so a blocked terminal delays no checkpoint, and no thread is
left. While Lightning shuts down after Ctrl-C and ignores further ones, one more Ctrl-C is honoured here.

What does not belong here: the outcome of the requests, and raising errors.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, TextIO

from async_ckpt.engine.failures import tell
from async_ckpt.handle import Handle, State
from async_ckpt.service import CheckpointService
from async_ckpt.telemetry.meter import Meter, SaveProgress

__all__ = ["give_up", "wait_with_progress"]

logger = logging.getLogger(__name__)

_SHORT_SECONDS = 1.0
_SLICE_SECONDS = 0.2
_BETWEEN_LINES_SECONDS = 10.0


def wait_with_progress(
    service: CheckpointService,
    meter: Meter,
    *,
    timeout: float | None = None,
    handle: Handle | None = None,
    clock: Callable[[], float] = monotonic,
) -> float | None:
    """Wait until the pending requests of *service* have ended, and show the progress.

    Args:
        service: has accepted the requests.
        meter: its observer.
        timeout: seconds to wait at most; ``None`` waits as long as the service's options say.
        handle: wait for this request only.
        clock: returns a monotonic time in seconds.

    Returns:
        The remaining seconds; ``None`` if the user interrupted the wait.

    Raises:
        KeyboardInterrupt: Ctrl-C, unless it is ignored; the requests go on.
    """
    patience = service.patience(timeout, clock=clock)
    pending = _of(service, meter) if handle is None else [handle]
    events: SimpleQueue[bool] = SimpleQueue()  # a signal handler may add to it
    for request in pending:
        request.add_done_callback(lambda _: events.put(True))
    saves = [save for save in meter.pending if handle is None or save.url == handle.shown_url]
    with (
        _receiving_interrupts(lambda: events.put(False)) as has_interrupts,
        _Display(saves, has_interrupts, clock) as display,
    ):
        while pending:
            left = patience.left()
            if left <= 0:
                message = "pending checkpoints have not ended%s; they go on, but this wait ends"
                logger.warning(message, patience.told)
                return 0.0
            try:
                if not events.get(timeout=min(left, _SLICE_SECONDS)):
                    return None
                pending.pop()  # which of them does not matter
            except Empty:
                pass
            display.update()
    return max(0.0, patience.left())


def give_up(service: CheckpointService) -> None:
    """Close *service* at once and log what is lost; earlier checkpoints stay, temporary files are removed (D2)."""
    urls = ", ".join(repr(request.shown_url) for request in service.pending)
    tell(f"interrupted: these checkpoints are given up: {urls}")
    service.close(timeout=0)


def _of(service: CheckpointService, meter: Meter) -> list[Handle]:
    """Return the pending requests, except saves without a snapshot: we may have interrupted their callers (L1)."""
    saves = {save.url for save in meter.pending}
    return [
        handle
        for handle in service.pending
        if handle.state is not State.ACCEPTED or handle.shown_url not in saves  # a deletion is never staged
    ]


@contextmanager
def _receiving_interrupts(interrupted: Callable[[], object]) -> Iterator[bool]:
    """Call *interrupted* on Ctrl-C if Lightning handles a first one and ignores others; yield whether it does.

    No exception is raised, as it would replace the first one, which decides how the program ends (E2).
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or not isinstance(sys.exc_info()[1], KeyboardInterrupt)
        or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ):
        yield False
        return
    signal.signal(signal.SIGINT, lambda *_: interrupted())
    try:
        yield True
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Display:
    """The progress display of some saves; bytes written before it began count for the bar, but not for the rate."""

    def __init__(self, saves: list[SaveProgress], has_interrupts: bool, clock: Callable[[], float]) -> None:
        self._saves = saves
        self._has_interrupts = has_interrupts
        self._clock = clock
        self._stream: TextIO | None = sys.stderr
        self._began = self._line_seconds = clock()
        self._before = self._done()
        self._bar: Any = None
        self._is_off = False

    def update(self) -> None:
        """Refresh the display if it is due."""
        now = self._clock()
        if self._is_off or now - self._began < _SHORT_SECONDS:
            return
        try:
            self._show(now)
        except Exception:  # a closed terminal or standard error must not lose a checkpoint
            self._is_off = True

    def _show(self, now: float) -> None:
        if self._bar is None:
            self._bar = self._open_bar(now)
        if self._is_off:
            return
        if self._bar:
            self._bar.n, self._bar.total = self._done(), self._total()
            self._bar.set_description(self._what())
        elif self._line_seconds == self._began or now - self._line_seconds >= _BETWEEN_LINES_SECONDS:
            self._line_seconds = now
            logger.warning("%s", self._line(now))

    def _open_bar(self, now: float) -> Any:
        from async_ckpt.format.reading.progress import is_first_rank, is_watched, open_bar

        self._is_off = not is_first_rank()
        if self._is_off or not is_watched(self._stream):
            return False
        return open_bar(
            self._what(),
            total=self._total(),
            before=self._before,
            seconds=now - self._began,
            leave=False,
            stream=self._stream,
        )

    def _line(self, now: float) -> str:
        done, total = self._done(), self._total()
        rate = (done - self._before) / max(now - self._began, 1e-9)
        unit, name = next((pair for pair in _UNITS if total >= pair[0]), _UNITS[-1])
        parts = [self._what()]
        if not self._saving():
            return parts[0] + self._hint()
        if total:
            parts.append(f"{done / unit:.1f} of {total / unit:.1f} {name}")
        if rate:
            parts.append(f"{rate / (1 << 20):.1f} MiB/s, {(total - done) / rate:.0f} s left")
        return ", ".join(parts) + self._hint()

    def _what(self) -> str:
        number = self._saving()
        what = f"{number} checkpoint{'s' if number > 1 else ''}" if number else "deletions"
        return f"waiting for {what}{self._hint() if self._bar else ''}"

    def _saving(self) -> int:
        return sum(save.end is None for save in self._saves)

    def _hint(self) -> str:
        return "; Ctrl-C gives up" if self._has_interrupts else ""

    def _done(self) -> int:
        return sum(save.written_bytes if save.end is None else save.nbytes for save in self._saves)

    def _total(self) -> int:
        return sum(save.nbytes for save in self._saves)

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            with suppress(Exception):
                self._bar.close()


_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
