"""A scatter list of memory that one range of a file is read into.

What does not belong here: reading.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Scatter"]


class Scatter:
    """The targets, which are filled one after the other.

    Args:
        targets: writable bytes; empty ones are skipped.

    Attributes:
        done: the number of bytes filled.
        left: the number of bytes still to fill.
    """

    __slots__ = ("_targets", "done", "left")

    def __init__(self, targets: Sequence[memoryview]) -> None:
        self._targets = [target.cast("B") for target in reversed(targets) if target.nbytes]
        self.done = 0
        self.left = sum(target.nbytes for target in self._targets)

    def take(self, data: bytes | memoryview) -> None:
        """Copy *data*; bytes beyond the end are dropped."""
        source = memoryview(data)[: self.left]
        self.done += source.nbytes
        self.left -= source.nbytes
        while source.nbytes:
            target = self._targets[-1]
            count = min(source.nbytes, target.nbytes)
            target[:count] = source[:count]
            source = source[count:]
            if count < target.nbytes:
                self._targets[-1] = target[count:]
            else:
                self._targets.pop()
