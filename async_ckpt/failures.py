"""What failed and has not been told yet, and how it is told.

Guarantees: each failure is raised, warned of, logged or printed once (E1); an error that is in flight is never
replaced (E2). Nothing here waits for a lock, so a signal handler may come at any line (L1).

What does not belong here: what fails, and when somebody asks.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections import deque
from contextlib import suppress

from async_ckpt.errors import FlushError
from async_ckpt.handle import Failure, Handle

__all__ = ["Failures", "tell"]

logger = logging.getLogger(__name__)


class Failures:
    """The failures of one service, oldest first. The loop thread adds them, any thread may collect.

    Args:
        warn: warn of a failure where it would be raised.
    """

    def __init__(self, *, warn: bool) -> None:
        self._warn = warn
        self._waiting: deque[Failure] = deque()
        self._ambient_error = id(sys.exc_info()[1])

    def __bool__(self) -> bool:
        """Whether there is anything that nobody has been told of."""
        return not all(failure.is_collected for failure in self._waiting.copy())

    def add(self, failure: Failure) -> None:
        """Take in a failure that nobody has been told of."""
        self._waiting.append(failure)

    def keep_ambient_error(self) -> None:
        """Count an error that was being handled when this was made as in flight, like later ones (E2).

        For owners that are made on demand, maybe while they handle an error that they will raise again.
        """
        self._ambient_error = 0

    def raise_all(self) -> None:
        """Raise what was not collected: for who asks whether all is well."""
        self._tell_caller(self._collect(), None)

    def raise_unless_in_flight(self, *, but: Handle) -> None:
        """Raise what was not collected; where an error is in flight, leave ours for the next call.

        Args:
            but: a request that its caller is about to get the handle of, however soon it failed.
        """
        if self._in_flight() is None:
            self._tell_caller(self._collect(but), None)

    def raise_or_add(self) -> None:
        """Raise what was not collected; where an error is in flight, log ours and add it to that error's notes."""
        self._tell_caller(self._collect(), self._in_flight())

    def log(self) -> None:
        """Log what was not collected, where nobody is there to be told."""
        if failures := self._collect():
            logger.error("%s", _described(failures), exc_info=_as_one(failures))

    def print_at_exit(self) -> bool:
        """Print what nobody has collected, waiters or not; tell whether that means that the program failed."""
        failures = [failure for failure in self._waiting if failure.collect()]
        for failure in failures:
            lines = traceback.format_exception(
                type(failure.error), failure.error, failure.error.__traceback__
            )
            tell(f"{failure.handle.url!r} failed, and nobody has been told:\n{''.join(lines)}")
        return bool(failures) and not self._warn

    def _in_flight(self) -> BaseException | None:
        error = sys.exc_info()[1]
        # Else it was being handled before there was a service: the program has caught it already.
        return error if id(error) != self._ambient_error else None

    def _collect(self, but: Handle | None = None) -> list[Failure]:
        """Take what nobody has collected and no handle's waiter is about to; *but* one, which stays."""
        # Copied in one step, whoever adds; each leaves only once it is told, as an interruption may come in between.
        offered = [
            failure
            for failure in self._waiting.copy()
            if not failure.handle.is_waited_for and failure.handle is not but
        ]
        collected = [failure for failure in offered if failure.collect()]
        for failure in offered:
            with suppress(ValueError):  # another thread was faster
                self._waiting.remove(failure)
        return collected

    def _tell_caller(self, failures: list[Failure], in_flight: BaseException | None) -> None:
        if not failures:
            return
        error = _as_one(failures)
        if self._warn:
            logger.warning("%s", _described(failures), exc_info=error)
            warnings.warn(f"{_described(failures)}: {error}", RuntimeWarning, stacklevel=_depth_of_caller())
        elif in_flight is None:
            raise error
        else:
            logger.error("%s while %r was in flight", _described(failures), in_flight, exc_info=error)
            if sys.version_info >= (3, 11):
                in_flight.add_note(f"{_described(failures)}: {error!r}")


def tell(message: str) -> None:
    """Tell the user on standard error, when nothing else is left to tell him by."""
    sys.stderr.write(f"async_ckpt: {message}\n")
    sys.stderr.flush()


def _as_one(failures: list[Failure]) -> Exception:
    errors = [failure.error for failure in failures]
    return errors[0] if len(errors) == 1 else FlushError("several checkpoint requests failed", errors)


def _described(failures: list[Failure]) -> str:
    return f"async_ckpt: failed: {', '.join(repr(failure.handle.url) for failure in failures)}"


def _depth_of_caller() -> int:
    """Return the ``stacklevel`` at which a warning points at the code that called this package."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    return depth
