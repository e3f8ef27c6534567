"""Shows the progress of a load, on a terminal or in the log.

Guarantees: a short load shows nothing, unless asked to; showing progress costs next to nothing. Without tqdm, lines are
logged instead of a bar.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

__all__ = ["Progress", "is_first_rank", "is_watched", "open_bar"]

_log = logging.getLogger("async_ckpt.load")

_SHORT_SECONDS = 2.0
_BETWEEN_TELLINGS_SECONDS = 0.2
_BETWEEN_LINES_SECONDS = 10.0
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


class Progress:
    """The progress of one load.

    Args:
        wanted: True always shows it, False never, None on a terminal once the load takes long.
        url: the location that is loaded.
        clock: returns a monotonic time in seconds.
        stream: the stream for the bar; standard error by default.
    """

    def __init__(
        self,
        wanted: bool | None,
        url: str,
        *,
        clock: Callable[[], float] = monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._tells = wanted or (wanted is None and is_first_rank() and is_watched(self._stream))
        self._asked = bool(wanted)
        self._url = url
        self._clock = clock
        self._done = 0
        self._total = 0
        self._began = self._told = clock()
        self._bar: Any = None

    def expect(self, nbytes: int) -> None:
        """Set the expected number of bytes."""
        self._total = nbytes

    def moved(self, nbytes: int) -> None:
        """Add *nbytes* bytes that have arrived."""
        self._done += nbytes
        if self._tells and self._clock() - self._told >= _BETWEEN_TELLINGS_SECONDS:
            self._quietly(self._tell)

    def _tell(self) -> None:
        now = self._clock()
        if not self._asked and now - self._began < _SHORT_SECONDS:
            return
        bar = self._bar if self._bar is not None else self._open_bar()
        if bar:
            self._told = now
            bar.update(self._done - bar.n)
        elif self._asked and now - self._told >= _BETWEEN_LINES_SECONDS:
            self._told = now
            self._log_line(now)

    def _open_bar(self) -> Any:
        self._bar = open_bar(
            self._url.rstrip("/").rpartition("/")[2],
            total=self._total,
            before=0,
            seconds=self._clock() - self._began,
            leave=self._asked,
            stream=self._stream,
        )
        return self._bar

    def _log_line(self, now: float) -> None:
        rate = self._done / max(now - self._began, 1e-9)
        left = max(0, self._total - self._done) / max(rate, 1e-9)
        _log.info(
            "loading %s: %d of %d MiB, %.0f MiB/s, %.0f s left",
            self._url,
            self._done >> 20,
            self._total >> 20,
            rate / (1 << 20),
            left,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asked and kind is None:
            self._quietly(self._tell_end)
        if self._bar:
            self._quietly(self._bar.close)

    def _tell_end(self) -> None:
        bar = self._bar if self._bar is not None else self._open_bar()
        if bar:
            bar.update(max(0, self._done - bar.n))
        else:
            self._log_line(self._clock())

    def _quietly(self, show: Callable[[], object]) -> None:
        try:
            show()
        except Exception:  # a missing or closed terminal must not make the load fail
            self._tells = False


def is_first_rank() -> bool:
    """Return whether this is the process that shows progress, if there are several."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def is_watched(stream: TextIO | None) -> bool:
    """Return whether *stream* is a terminal or a notebook."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def open_bar(
    what: str, *, total: int, before: int, seconds: float, leave: bool, stream: TextIO | None
) -> Any:
    """Return a tqdm bar of bytes, which leaves no thread; ``False`` without tqdm.

    Args:
        what: the text before the bar.
        total: the expected number of bytes.
        before: the number of bytes when it began.
        seconds: how long ago it began.
        leave: whether the bar stays on screen when it is closed.
        stream: the stream for the bar.
    """
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        return False
    bar = type(
        "Bar", (tqdm,), {"monitor_interval": 0}
    )(  # without tqdm's monitor thread, which is only needed for bars that are updated rarely
        desc=what,
        total=total,
        initial=before,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=leave,
        file=stream,
    )
    bar.start_t -= seconds
    return bar
