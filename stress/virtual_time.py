"""An event loop in virtual time: hours of waiting take milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["VirtualLoop", "virtual_loop"]


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next event, so that nothing waits."""

    def __init__(self) -> None:
        super().__init__(_NoSelector(self))
        self.now = 0.0

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now


class _NoSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._virtual = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "all tasks wait for each other"
        self._virtual.now += max(timeout, 0.0)
        return []


@contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    """Yield a loop, and close it at the end."""
    loop = VirtualLoop()
    try:
        yield loop
    finally:
        loop.close()
