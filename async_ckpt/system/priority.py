"""Lets training go first: bulk work of ours gets a small share of busy CPUs, until somebody waits for it.

Guarantees:

* Only a thread within `bulk_work` is lowered, by itself, and it leaves at the priority at which it came. So no thread
  of anybody else's is touched, and none that is started meanwhile inherits anything: nobody starts one there.
* As long as anybody is within `waiting`, no thread is lowered; those that are rise at once. So they do when their
  `Background` is late, for what is lowered gets on slowly on CPUs that are always busy.
* A thread is lowered only where it may rise again, which takes a right (CAP_SYS_NICE, or RLIMIT_NICE of 20). Where the
  system refuses, or is not Linux, everything stays as it is.
* Nothing waits for a lock: a signal handler may interrupt any line, and wait (L1).

Put within `bulk_work` only long calls that do not need the GIL, and hold no lock that training might want: whoever
waits for what a lowered thread holds waits as long as that does. At the end of each such call, the thread takes the GIL
while it is still lowered. So a series of short calls, such as checksums, does not belong there, nor does anything that
starts a thread or a process, or imports, nor ``fsync``, which holds the journal of the file system.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import ref

from async_ckpt.system import threads

__all__ = ["NICE", "Background", "background", "bulk_work", "waiting"]

logger = logging.getLogger(__name__)


class Background:
    """One piece of work that training goes before, until it is late. Compared by identity."""

    def __init__(self) -> None:
        self._is_late = False

    @property
    def may_wait(self) -> bool:
        """Whether its threads are to be lowered now."""
        return not self._is_late and all(waiter() is None for waiter in _waiters.copy())

    def hurry(self) -> None:
        """Go on at normal priority from now on; on any thread."""
        self._is_late = True
        _raise_all()


class _Waiter:
    """Somebody who waits, as long as this lives."""

    __slots__ = ("__weakref__",)


NICE = 10
"""Of what is lowered: a tenth of a CPU for which it competes. Much less, and it holds the GIL where it does not run."""

_LEAST_BYTES = 1 << 20  # they take longer than all that is done here

_work: ContextVar[Background | None] = ContextVar("async_ckpt_background", default=None)
_lowered: dict[int, int] = {}  # threads within `bulk_work`, by native id, and the nice value to go back to
_waiters: set[ref[_Waiter]] = set()  # weakly, as Ctrl-C may come where one is to be taken out
_may_lower: bool | None = None  # None: not known yet


@contextmanager
def background() -> Iterator[Background]:
    """Have training go before what the body does, and tasks and workers that it starts."""
    work = Background()
    token = _work.set(work)
    try:
        yield work
    finally:
        _work.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Have all threads at normal priority: the body waits for what they do."""
    here = _Waiter()
    known = ref(here)
    try:
        _waiters.add(known)  # first: a thread that is about to be lowered looks after it
        _raise_all()
        yield
    finally:
        _waiters.discard(known)


@contextmanager
def bulk_work(nbytes: int) -> Iterator[None]:
    """Lower this thread for the body, which goes over many bytes, if it belongs to a `background` and nobody waits.

    Called by workers alone, where no signal handler raises.
    """
    work = _work.get()
    if work is None or nbytes < _LEAST_BYTES or not work.may_wait or not _can_return():
        yield
        return
    thread = threading.get_native_id()
    usual = os.getpriority(os.PRIO_PROCESS, thread)
    if usual >= NICE:  # the whole program is nice
        yield
        return
    try:
        _lowered[thread] = usual  # first: who waits from here on raises it
        _set_nice(thread, NICE)
        if not work.may_wait:
            _set_nice(thread, usual)
        yield
    finally:
        _lowered.pop(thread, None)
        _set_nice(thread, usual)


def _raise_all() -> None:
    for thread, usual in list(_lowered.items()):
        _set_nice(thread, usual)


def _set_nice(thread: int, value: int) -> None:
    """Give a thread a nice value, as Linux can. What is refused is not tried again."""
    try:
        os.setpriority(os.PRIO_PROCESS, thread, value)
    except ProcessLookupError:  # it has just ended
        return
    except OSError as error:
        _note_refusal(error)


def _note_refusal(error: Exception) -> None:
    global _may_lower
    _may_lower = False
    logger.debug("saves run at normal priority: a thread that was lowered could not rise again: %s", error)


def _can_return() -> bool:
    """Return whether a thread that was lowered may rise again: tried once, by one that ends right after."""
    global _may_lower
    if _may_lower is None:
        probe = threading.Thread(target=_go_and_return, name="async_ckpt-priority", daemon=True)
        try:
            threads.start(probe)
            probe.join()
        except RuntimeError as error:  # the system allows no more threads
            _note_refusal(error)
        if _may_lower is None:
            _may_lower = True
    return _may_lower


def _go_and_return() -> None:
    if sys.platform != "linux":  # elsewhere, only whole processes are nice
        _note_refusal(OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)))
        return
    thread = threading.get_native_id()
    usual = os.getpriority(os.PRIO_PROCESS, thread)
    _set_nice(thread, max(usual, NICE))
    _set_nice(thread, usual)


def _forget_in_child() -> None:
    """No thread of the parent's exists in a forked child, and nobody waits there."""
    _lowered.clear()
    _waiters.clear()


os.register_at_fork(after_in_child=_forget_in_child)
