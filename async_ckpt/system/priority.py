"""Gives training priority: bulk work of saves gets only a small share of busy CPUs, until somebody waits for it.

Guarantees:

* A thread lowers only its own priority, within `bulk_work`, and restores it at the end. No other thread of the program
  is affected, and none inherits a low priority, because no thread is started there.
* While any thread is within `waiting`, no thread has a low priority; those that had one get their normal priority back
  at once. The same happens when their `Background` is late, because low priority means slow progress on busy CPUs.
* A thread lowers its priority only if it may restore it, which needs a right (CAP_SYS_NICE, or RLIMIT_NICE of 20). If
  the system refuses that, or is not Linux, nothing changes.
* Nothing waits for a lock: a signal handler may interrupt any line, and wait (L1).

Use `bulk_work` only for long calls that release the GIL and hold no lock that training may need, because a thread that
waits for such a lock waits for the slow thread. At the end of each call the slow thread takes the GIL. So do not use it
for a series of short calls, such as checksums; nor for code that starts a thread or a process, or imports a module; nor
for ``fsync``, which holds the journal of the file system.
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

__all__ = ["NICE", "Background", "background", "bulk_work", "is_waited_for", "waiting"]

logger = logging.getLogger(__name__)


class Background:
    """Work with lower priority than training, until it is late. Compared by identity."""

    def __init__(self) -> None:
        self._is_late = False

    @property
    def may_wait(self) -> bool:
        """Whether its threads should have a low priority now."""
        return not self._is_late and not is_waited_for()

    def hurry(self) -> None:
        """Continue at normal priority from now on; any thread may call this."""
        self._is_late = True
        _raise_all()


class _Waiter:
    """A thread or task that waits, as long as this object exists."""

    __slots__ = ("__weakref__",)


NICE = 10
"""The low priority: a tenth of a contended CPU. With much less, a thread could hold the GIL without running."""

_LEAST_BYTES = 1 << 20  # with fewer bytes, changing the priority takes longer than the work

_work: ContextVar[Background | None] = ContextVar("async_ckpt_background", default=None)
_lowered: dict[int, int] = {}  # threads within `bulk_work`, by native id: the nice value to restore
_waiters: set[ref[_Waiter]] = set()  # weak references, because Ctrl-C may come just before one is removed
_may_lower: bool | None = None  # None if it is not known yet


def is_waited_for() -> bool:
    """Return whether anybody is within `waiting`."""
    return any(waiter() is not None for waiter in _waiters.copy())


@contextmanager
def background() -> Iterator[Background]:
    """Give the bulk work of the body, and of tasks and workers that it starts, lower priority than training."""
    work = Background()
    token = _work.set(work)
    try:
        yield work
    finally:
        _work.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Give all threads normal priority, because the body waits for their work."""
    here = _Waiter()
    known = ref(here)
    try:
        _waiters.add(known)  # first: a thread that lowers itself just now checks this afterwards
        _raise_all()
        yield
    finally:
        _waiters.discard(known)


@contextmanager
def bulk_work(nbytes: int) -> Iterator[None]:
    """Lower this thread's priority for the body, which processes *nbytes* bytes, if it is in a `background`.

    Only workers call it, where no signal handler raises.
    """
    work = _work.get()
    if work is None or nbytes < _LEAST_BYTES or not work.may_wait or not _can_restore():
        yield
        return
    thread = threading.get_native_id()
    usual = os.getpriority(os.PRIO_PROCESS, thread)
    if usual >= NICE:  # the program runs at that priority anyway
        yield
        return
    try:
        _lowered[thread] = usual  # first: a thread that begins to wait from here on restores it
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
    """Set the nice value of one thread, which Linux supports; after a refusal, it is not tried again."""
    try:
        os.setpriority(os.PRIO_PROCESS, thread, value)
    except ProcessLookupError:  # it has just ended
        return
    except OSError as error:
        _note_refusal(error)


def _note_refusal(error: Exception) -> None:
    global _may_lower
    _may_lower = False
    logger.debug("saves run at normal priority, because a thread could not restore its own: %s", error)


def _can_restore() -> bool:
    """Return whether a thread may restore its priority: tried once, by a thread that ends right after."""
    global _may_lower
    if _may_lower is None:
        probe = threading.Thread(target=_lower_and_restore, name="async_ckpt-priority", daemon=True)
        try:
            threads.start(probe)
            probe.join()
        except RuntimeError as error:  # the system allows no more threads
            _note_refusal(error)
        if _may_lower is None:
            _may_lower = True
    return _may_lower


def _lower_and_restore() -> None:
    if sys.platform != "linux":  # other systems know nice values of whole processes only
        _note_refusal(OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)))
        return
    thread = threading.get_native_id()
    usual = os.getpriority(os.PRIO_PROCESS, thread)
    _set_nice(thread, max(usual, NICE))
    _set_nice(thread, usual)


def _forget_in_child() -> None:
    """Forget the parent's threads, which do not exist in a forked child."""
    _lowered.clear()
    _waiters.clear()


os.register_at_fork(after_in_child=_forget_in_child)
