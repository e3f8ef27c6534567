"""Processes that are made cheaply, talk through a pipe, and may be killed at any moment.

Guarantees: each is a child of a server without threads of ours, with the package imported; nothing of it, and no
descriptor for it, is left after the block. What was said before the death is heard after it.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

__all__ = ["Child", "Say", "child", "start_server"]

Say = Callable[[Any], None]
"""What a child tells its parent with; from any of its threads."""


class Child:
    """One process; made by ``child``."""

    def __init__(self, process: Any, ours: Connection) -> None:
        self._process = process
        self._ours = ours

    def words(self, *, seconds: float) -> Iterator[Any]:
        """Yield what the process says, until it is dead or *seconds* after its first word have passed."""
        deadline = None
        try:
            while self._ours.poll(None if deadline is None else max(0.0, deadline - monotonic())):
                yield self._ours.recv()
                deadline = deadline or monotonic() + seconds
        except (EOFError, OSError):  # dead, perhaps in the middle of a word
            return

    def is_alive(self) -> bool:
        """Return whether it has not died yet."""
        return bool(self._process.is_alive())

    def kill(self) -> Iterator[Any]:
        """Kill it, wait until it is gone, and return what it had said and nobody has heard yet."""
        self._process.kill()
        self._process.join()
        return self.words(seconds=0.0)


def start_server() -> None:
    """Start what all children come from; it stays, and has the environment of this moment."""
    forkserver.set_forkserver_preload(["async_ckpt"])
    forkserver.ensure_running()


@contextmanager
def child(program: Callable[..., None], *arguments: Any) -> Iterator[Child]:
    """Run *program*, which is given a ``Say`` and *arguments*, in a process for the time of the block, at the most."""
    context = multiprocessing.get_context("forkserver")
    ours, its = context.Pipe(duplex=False)
    with ours:
        process = context.Process(target=_run, args=(program, its, arguments))
        process.start()
        its.close()
        found = Child(process, ours)
        try:
            yield found
        finally:
            process.kill()
            process.join()
            process.close()


def _run(program: Callable[..., None], parent: Connection, arguments: tuple[Any, ...]) -> None:
    sending = threading.Lock()

    def say(word: Any) -> None:
        with sending:
            parent.send(word)

    program(say, *arguments)
