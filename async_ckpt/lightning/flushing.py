"""Waiting for pending checkpoints where a person waits, too.

Guarantees: nothing is shown of a short wait; of a longer one a bar on a terminal, else a line in the log now and
then, by the first rank alone. The waiting thread itself draws: a terminal that holds it up holds up no checkpoint,
and no thread is left. Where Lightning ends because of Ctrl-C, and has stopped listening, one more is heard.

What does not belong here: what becomes of the requests, and what is raised.
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

__all__ = ["give_up", "patiently"]

logger = logging.getLogger(__name__)

_SHORT_SECONDS = 1.0
_SLICE_SECONDS = 0.2
_BETWEEN_LINES_SECONDS = 10.0


def patiently(
    service: CheckpointService,
    meter: Meter,
    *,
    timeout: float | None = None,
    handle: Handle | None = None,
    clock: Callable[[], float] = monotonic,
) -> float | None:
    """Wait until what *service* has pending has ended, and show how far it is.

    Args:
        service: who has accepted it.
        meter: its observer.
        timeout: seconds to wait at the most; ``None`` waits as long as the service's options say.
        handle: wait for this request alone.
        clock: returns a monotonic time in seconds.

    Returns:
        The seconds that are left to wait; ``None`` where the user does not want to wait any longer.

    Raises:
        KeyboardInterrupt: Ctrl-C, where it is not ignored; everything goes on.
    """
    patience = service.patience(timeout, clock=clock)
    pending = _of(service, meter) if handle is None else [handle]
    bell: SimpleQueue[bool] = SimpleQueue()  # a signal handler may ring it
    for request in pending:
        request.add_done_callback(lambda _: bell.put(True))
    saves = [save for save in meter.pending if handle is None or save.url == handle.shown_url]
    with _hearing_interrupts(lambda: bell.put(False)) as heard, _Display(saves, heard, clock) as display:
        while pending:
            left = patience.left()
            if left <= 0:
                logger.warning("not done%s; no longer waited for", patience.told)
                return 0.0
            try:
                if not bell.get(timeout=min(left, _SLICE_SECONDS)):
                    return None
                pending.pop()  # which of them does not matter
            except Empty:
                pass
            display.update()
    return max(0.0, patience.left())


def give_up(service: CheckpointService) -> None:
    """Close *service* at once and say what that costs; earlier checkpoints stay, and no temporary file does (D2)."""
    urls = ", ".join(repr(request.shown_url) for request in service.pending)
    tell(f"interrupted: given up: {urls}")
    service.close(timeout=0)


def _of(service: CheckpointService, meter: Meter) -> list[Handle]:
    """Return what is pending, but for saves still without snapshot, whose callers we may have interrupted (L1)."""
    saves = {save.url for save in meter.pending}
    return [
        handle
        for handle in service.pending
        if handle.state is not State.ACCEPTED or handle.shown_url not in saves  # a deletion is never staged
    ]


@contextmanager
def _hearing_interrupts(ring: Callable[[], object]) -> Iterator[bool]:
    """Call *ring* on Ctrl-C where a first one is being handled and more are ignored; yield whether that is so.

    It is only rung, so that no exception takes the place of the first, which decides how the program ends (E2).
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or not isinstance(sys.exc_info()[1], KeyboardInterrupt)
        or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    ):
        yield False
        return
    signal.signal(signal.SIGINT, lambda *_: ring())
    try:
        yield True
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Display:
    """How far some saves are, as it is shown; the bytes written before count for the bar, not for the rate."""

    def __init__(self, saves: list[SaveProgress], heard: bool, clock: Callable[[], float]) -> None:
        self._saves = saves
        self._heard = heard
        self._clock = clock
        self._stream: TextIO | None = sys.stderr
        self._began = self._told = clock()
        self._before = self._done()
        self._bar: Any = None
        self._silent = False

    def update(self) -> None:
        """Show it, if it is time to."""
        now = self._clock()
        if self._silent or now - self._began < _SHORT_SECONDS:
            return
        try:
            self._show(now)
        except Exception:  # the terminal is gone, or standard error closed: no reason to lose a checkpoint
            self._silent = True

    def _show(self, now: float) -> None:
        if self._bar is None:
            self._bar = self._open_bar(now)
        if self._silent:
            return
        if self._bar:
            self._bar.n, self._bar.total = self._done(), self._total()
            self._bar.set_description(self._what())
        elif self._told == self._began or now - self._told >= _BETWEEN_LINES_SECONDS:
            self._told = now
            logger.warning("%s", self._line(now))

    def _open_bar(self, now: float) -> Any:
        from async_ckpt.format.reading.progress import is_first_rank, is_watched, open_bar

        self._silent = not is_first_rank()
        if self._silent or not is_watched(self._stream):
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
            return parts[0] + self._way_out()
        if total:
            parts.append(f"{done / unit:.1f} of {total / unit:.1f} {name}")
        if rate:
            parts.append(f"{rate / (1 << 20):.1f} MiB/s, {(total - done) / rate:.0f} s left")
        return ", ".join(parts) + self._way_out()

    def _what(self) -> str:
        number = self._saving()
        what = f"{number} checkpoint{'s' if number > 1 else ''}" if number else "deletions"
        return f"waiting for {what}{self._way_out() if self._bar else ''}"

    def _saving(self) -> int:
        return sum(save.end is None for save in self._saves)

    def _way_out(self) -> str:
        return "; Ctrl-C gives up" if self._heard else ""

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
