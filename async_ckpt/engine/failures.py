"""What failed and has not been told yet, and how it is told.

Guarantees: each failure is raised, warned of, logged or printed once (E1), twice at the most where Ctrl-C comes while
it is told: that it has been is noted last. An error that is in flight is never replaced (E2). Nothing here waits for a
lock, so a signal handler may come at any line (L1).

What does not belong here: what fails, and when somebody asks.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from async_ckpt.errors import FlushError
from async_ckpt.handle import Failure, Handle

__all__ = ["Failures", "tell"]

logger = logging.getLogger(__name__)

_MARK = "_async_ckpt_ambient"


class _Mark:
    """What an error carries that was being handled as a service was made; it goes no further than that error."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _no_mark() -> None:
    return None


def _mark_current_error() -> Callable[[], _Mark | None]:
    """Return a weak reference to the mark of the error that is being handled.

    An error cannot be referred to weakly, and strongly would keep what its frames hold; an id is another one's later.
    """
    error = sys.exc_info()[1]
    if error is None:
        return _no_mark
    mark = vars(error).get(_MARK)  # another service's
    if mark is None:
        mark = vars(error)[_MARK] = _Mark()
    return weakref.ref(mark)


class Failures:
    """The failures of one service, oldest first. The loop thread adds them, any thread may collect.

    Args:
        warn: warn of a failure where it would be raised.
    """

    def __init__(self, *, warn: bool) -> None:
        self._warn = warn
        self._unreported: set[Failure] = set()  # those that a handle has told may be among them
        self._ambient_mark = _mark_current_error()

    def __bool__(self) -> bool:
        """Whether there is anything that nobody has been told of."""
        return not all(failure.is_reported for failure in self._unreported.copy())

    def untold(self) -> list[Exception]:
        """Return what nobody has been told of, oldest first; it stays untold."""
        return [failure.error for failure in self._in_order()]

    def add(self, failure: Failure) -> None:
        """Take in a failure that nobody has been told of."""
        self._unreported.add(failure)

    def take_over(self, other: Failures) -> None:
        """Tell from now on of what *other* has not told."""
        failures = other._in_order()
        self._unreported.update(failures)
        other._mark_reported(failures)

    def keep_ambient_error(self) -> None:
        """Count an error that was being handled when this was made as in flight, like later ones (E2).

        For owners that are made on demand, maybe while they handle an error that they will raise again.
        """
        self._ambient_mark = _no_mark

    def raise_all(self) -> None:
        """Raise what was not collected, for callers that ask whether all is well."""
        self.raise_claimed(self.claim())

    def raise_unless_in_flight(self, *, but: Handle) -> None:
        """Raise what was not collected; where an error is in flight, leave ours for the next call.

        Args:
            but: a request that its caller is about to get the handle of, however soon it failed.
        """
        if self._in_flight() is None:
            self.raise_claimed(self.claim(but))

    def raise_or_add(self) -> None:
        """Raise what was not collected; where an error is in flight, log ours and add it to that error's notes."""
        failures, in_flight = self.claim(), self._in_flight()
        if failures and in_flight is not None:
            error = _as_one(failures)
            logger.error("%s while %r was in flight", _described(failures), in_flight, exc_info=error)
            if sys.version_info >= (3, 11):
                in_flight.add_note(f"{_described(failures)}: {error!r}")
            self._mark_reported(failures)
        else:
            self.raise_claimed(failures)

    def claim(self, but: Handle | None = None) -> list[Failure]:
        """Return what this thread has to raise, and no other will; where a warning is wished for instead, warn.

        Args:
            but: a request whose failure is to stay.
        """
        failures = self._claimed(but)
        if failures and self._warn:
            self._warn_of(failures)
            return []
        return failures

    def raise_claimed(self, failures: list[Failure]) -> None:
        """Raise what `claim` returned, if anything; a caller who does no more after it loses nothing to Ctrl-C."""
        if not failures:
            return
        error = _as_one(failures)
        try:
            raise error
        finally:
            if sys.exc_info()[1] is error:  # and no interruption
                self._mark_reported(failures)

    def log(self) -> None:
        """Log what was not collected, where nobody is there to be told."""
        if failures := self._claimed():
            logger.error("%s", _described(failures), exc_info=_as_one(failures))
            self._mark_reported(failures)

    def print_at_exit(self) -> bool:
        """Print what nobody has been told, waiters or not; return whether that means that the program failed."""
        failures = self._in_order()
        for failure in failures:
            lines = traceback.format_exception(
                type(failure.error), failure.error, failure.error.__traceback__
            )
            tell(f"{failure.handle.shown_url!r} failed, and nobody has been told:\n{''.join(lines)}")
            self._mark_reported([failure])
        return bool(failures) and not self._warn

    def _in_flight(self) -> BaseException | None:
        error = sys.exc_info()[1]
        mark = self._ambient_mark()
        if mark is not None and error is not None and vars(error).get(_MARK) is mark:
            return None  # it was being handled before there was a service: the program has caught it already
        return error

    def _claimed(self, but: Handle | None = None) -> list[Failure]:
        """Take what no handle's waiter is about to be told, and no other thread is telling; *but* one."""
        return [
            failure
            for failure in self._in_order()
            if not failure.handle.is_waited_for
            and failure.handle is not but
            and failure.claim()
            and failure in self._unreported  # still: a signal handler may have told of it
        ]

    def _in_order(self) -> list[Failure]:
        """Return what nobody has been told, oldest first."""
        untold = self._unreported.copy()  # in one step, whoever adds
        self._mark_reported([failure for failure in untold if failure.is_reported])
        return sorted(
            (failure for failure in untold if not failure.is_reported), key=lambda failure: failure.number
        )

    def _mark_reported(self, failures: list[Failure]) -> None:
        self._unreported.difference_update(failures)  # all in one step, as Ctrl-C may come between two

    def _warn_of(self, failures: list[Failure]) -> None:
        error = _as_one(failures)
        logger.warning("%s", _described(failures), exc_info=error)
        try:
            warnings.warn(f"{_described(failures)}: {error}", RuntimeWarning, stacklevel=_depth_of_caller())
        except RuntimeWarning:  # the program has it raised
            self._mark_reported(failures)
            raise
        self._mark_reported(failures)


def tell(message: str) -> None:
    """Tell the user on standard error, when nothing else is left to tell him by; in the log where nobody reads that."""
    try:
        sys.stderr.write(f"async_ckpt: {message}\n")
        sys.stderr.flush()
    except Exception:  # there is none; it is closed; its reader has gone; it is the program's own, and raises
        with suppress(Exception):
            logger.error("%s", message)


def _as_one(failures: list[Failure]) -> Exception:
    errors = [failure.error for failure in failures]
    return errors[0] if len(errors) == 1 else FlushError("several checkpoint requests failed", errors)


def _described(failures: list[Failure]) -> str:
    return f"async_ckpt: failed: {', '.join(repr(failure.handle.shown_url) for failure in failures)}"


def _depth_of_caller() -> int:
    """Return the ``stacklevel`` at which a warning points at the code that called this package."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    return depth
