"""Starting threads where a signal handler may raise at any line, as Ctrl-C's does.

Guarantees: whatever interrupts it, a thread that was to start runs, or was never made; none is left half started, which
would hold up the end of the interpreter (bpo-29988: ``Thread.start`` waits with a lock that an interruption can leave
taken, and then the new thread waits for that lock for ever).

What does not belong here: what the threads do.
"""

from __future__ import annotations

import _thread
import threading
from queue import SimpleQueue

__all__ = ["start"]


def start(*threads: threading.Thread) -> None:
    """Start *threads*, one after the other.

    Interrupted on the main thread, they are started all the same, maybe a moment later.

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
