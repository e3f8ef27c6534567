"""A disk that holds writes up, and tells how nice their threads are."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from async_ckpt import CheckpointService
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.system.priority import NICE
from tests.support import PATIENCE_SECONDS

LONG_BYTES = 1 << 20

__all__ = ["USUAL", "HeldDisk", "may_rise", "nice_of", "until"]


USUAL = os.getpriority(os.PRIO_PROCESS, 0)
"""How nice a thread is to which nothing was done."""


def nice_of(thread: int) -> int:
    """Return the nice value of a thread, by its native id."""
    return os.getpriority(os.PRIO_PROCESS, thread)


def until(is_so: Callable[[], bool]) -> bool:
    """Look again and again until it is so; return whether it was so in time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True


def may_rise() -> bool:
    """Return whether a thread of this user's may rise again."""
    risen = []

    def go_and_return() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, USUAL + 1)
        try:
            os.setpriority(os.PRIO_PROCESS, thread, USUAL)
        except PermissionError:
            return
        risen.append(thread)

    if sys.platform == "linux" and USUAL < NICE:
        thread = threading.Thread(target=go_and_return)
        thread.start()
        thread.join()
    return bool(risen)


class HeldDisk(Disk):
    """A disk whose long writes wait until they may go on.

    Attributes:
        thread: what writes; 0 before the first.
        held: set as soon as one is.
        gave_up: the last one went on although it might not.
        values: how nice what wrote was, each time.
        goes_on: asked again and again, until one may go on.
    """

    def __init__(self) -> None:
        self.thread = 0
        self.values: list[int] = []
        self.held = threading.Event()
        self.gave_up = False
        self.goes_on: Callable[[], bool] = lambda: False

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Write; what is long, only when it may."""
        if sum(piece.nbytes for piece in pieces) < LONG_BYTES:
            return super().write(fd, pieces, offset)
        self.thread = threading.get_native_id()
        self.values.append(nice_of(self.thread))
        self.held.set()
        self.gave_up = not until(lambda: self.goes_on())
        return super().write(fd, pieces, offset)

    def is_normal(self) -> bool:
        """Return whether what writes is at normal priority now."""
        return nice_of(self.thread) == USUAL

    def service(self, **options: object) -> CheckpointService:
        """Return a service that writes to this disk."""
        return CheckpointService(
            store_factory=lambda _, workers: LocalStore(workers=workers, disk=self), **options
        )
