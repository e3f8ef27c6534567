"""Failures that have not been reported yet, and how they are reported.

Guarantees: each failure is raised, warned of, logged or printed once (E1); or twice if Ctrl-C interrupts the report, as
a failure is marked as reported last. An error in flight is never replaced (E2). Nothing here waits for a lock, so a
signal handler may interrupt any line (L1).

What does not belong here: what fails, and when failures are reported.
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
    """Marks an error that was being handled when a service was made; it is not pickled with the error."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _no_mark() -> None:
    return None


def _mark_current_error() -> Callable[[], _Mark | None]:
    """Return a weak reference to the mark of the error that is being handled.

    There are no weak references to errors, a strong one would keep the objects in its frames, and an id is reused.
    """
    error = sys.exc_info()[1]
    if error is None:
        return _no_mark
    mark = vars(error).get(_MARK)  # another service may have set it
    if mark is None:
        mark = vars(error)[_MARK] = _Mark()
    return weakref.ref(mark)


class Failures:
    """The unreported failures of one service. The loop thread adds them; any thread may report them.

    Args:
        warn: warn of failures instead of raising them.
    """

    def __init__(self, *, warn: bool) -> None:
        self._warn = warn
        self._unreported: set[Failure] = set()  # may include failures that a handle has reported
        self._ambient_mark = _mark_current_error()

    def __bool__(self) -> bool:
        """Whether there is an unreported failure."""
        return not all(failure.is_reported for failure in self._unreported.copy())

    def unreported(self) -> list[Exception]:
        """Return the unreported errors, oldest first; they stay unreported."""
        return [failure.error for failure in self._in_order()]

    def add(self, failure: Failure) -> None:
        """Add an unreported failure."""
        self._unreported.add(failure)

    def take_over(self, other: Failures) -> None:
        """Take over the unreported failures of *other*."""
        failures = other._in_order()
        self._unreported.update(failures)
        other._mark_reported(failures)

    def keep_ambient_error(self) -> None:
        """Treat an error that was being handled when this was made as in flight, like later ones (E2).

        For objects made on demand, perhaps while an error is handled that will be raised again.
        """
        self._ambient_mark = _no_mark

    def raise_all(self) -> None:
        """Raise the unreported failures."""
        self.raise_claimed(self.claim())

    def raise_unless_in_flight(self, *, but: Handle | None) -> None:
        """Raise the unreported failures; if an error is in flight, leave them for the next call.

        Args:
            but: a request whose handle is about to be returned; its failure is left to the handle.
        """
        if self._in_flight() is None:
            self.raise_claimed(self.claim(but))

    def raise_or_add(self) -> None:
        """Raise the unreported failures; if an error is in flight, log them and add them to its notes."""
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
        """Return the failures that this thread, and no other, has to raise; none if it warns of them instead.

        Args:
            but: a request whose failure is not claimed.
        """
        failures = self._claimed(but)
        if failures and self._warn:
            self._warn_of(failures)
            return []
        return failures

    def raise_claimed(self, failures: list[Failure]) -> None:
        """Raise the failures that `claim` returned, if any. Called last, so that Ctrl-C loses none of them."""
        if not failures:
            return
        error = _as_one(failures)
        try:
            raise error
        finally:
            if sys.exc_info()[1] is error:  # and not Ctrl-C
                self._mark_reported(failures)

    def log(self) -> None:
        """Log the unreported failures, if there is no caller to raise them to."""
        if failures := self._claimed():
            logger.error("%s", _described(failures), exc_info=_as_one(failures))
            self._mark_reported(failures)

    def print_at_exit(self) -> bool:
        """Print the unreported failures, even those with waiters; return whether the program has failed."""
        failures = self._in_order()
        for failure in failures:
            lines = traceback.format_exception(
                type(failure.error), failure.error, failure.error.__traceback__
            )
            tell(
                f"{failure.handle.shown_url!r} failed, and the error has not been raised yet:\n{''.join(lines)}"
            )
            self._mark_reported([failure])
        return bool(failures) and not self._warn

    def _in_flight(self) -> BaseException | None:
        error = sys.exc_info()[1]
        mark = self._ambient_mark()
        if mark is not None and error is not None and vars(error).get(_MARK) is mark:
            return None  # it was being handled before the service existed, so the program has caught it
        return error

    def _claimed(self, but: Handle | None = None) -> list[Failure]:
        """Claim the failures that no waiter and no other thread is about to report, without that of *but*."""
        return [
            failure
            for failure in self._in_order()
            if not failure.handle.is_waited_for
            and failure.handle is not but
            and failure.claim()
            and failure in self._unreported  # still: a signal handler may have reported it
        ]

    def _in_order(self) -> list[Failure]:
        """Return the unreported failures, oldest first."""
        unreported = self._unreported.copy()  # in one step, as other threads may add to it
        self._mark_reported([failure for failure in unreported if failure.is_reported])
        return sorted(
            (failure for failure in unreported if not failure.is_reported), key=lambda failure: failure.number
        )

    def _mark_reported(self, failures: list[Failure]) -> None:
        self._unreported.difference_update(failures)  # all in one step, as Ctrl-C may come between two

    def _warn_of(self, failures: list[Failure]) -> None:
        error = _as_one(failures)
        logger.warning("%s", _described(failures), exc_info=error)
        try:
            warnings.warn(f"{_described(failures)}: {error}", RuntimeWarning, stacklevel=_depth_of_caller())
        except RuntimeWarning:  # the program turns warnings into errors
            self._mark_reported(failures)
            raise
        self._mark_reported(failures)


def tell(message: str) -> None:
    """Print a message to standard error, or log it if that fails; for the exit, when there is no call to raise it."""
    try:
        sys.stderr.write(f"async_ckpt: {message}\n")
        sys.stderr.flush()
    except Exception:  # there is none, it is closed or unread, or the program replaced it
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
