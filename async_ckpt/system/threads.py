"""Starts threads safely although a signal handler, such as Ctrl-C's, may raise at any line.

Guarantees: despite interruptions, a thread either runs or was never made; none is left half started, which would block
the interpreter's exit (bpo-29988: ``Thread.start`` waits with a lock that an interruption can leave locked, and the new
thread then waits for that lock forever).

What does not belong here: the work of the threads.
"""

from __future__ import annotations

import _thread
import threading
from queue import SimpleQueue

__all__ = ["start"]


def start(*threads: threading.Thread) -> None:
    """Start *threads*, one after the other.

    If the main thread is interrupted, they are started all the same, perhaps a moment later.

    Raises:
        RuntimeError: the system allows no more threads; those after the first that failed are not started.
    """
    if not threads:
        return
    if threading.current_thread() is not threading.main_thread():  # where no signal handler runs
        _start(threads)
        return
    started: SimpleQueue[BaseException | None] = SimpleQueue()

    def start_elsewhere() -> None:
        try:
            _start(threads)
        except BaseException as error:
            started.put(error)
        else:
            started.put(None)

    _thread.start_new_thread(start_elsewhere, ())  # in one step, as it is written in C
    error = started.get()
    if error is not None:
        raise error


def _start(threads: tuple[threading.Thread, ...]) -> None:
    for thread in threads:
        thread.start()
