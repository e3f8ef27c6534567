"""The live operations, sorted: by location, and by lane.

What does not belong here: which of them may run (queue).
"""

from __future__ import annotations

from collections import OrderedDict

from async_ckpt.engine.queue.names import Names
from async_ckpt.engine.queue.operation import Kind, Lane, Op
from async_ckpt.engine.queue.turns import Slots

__all__ = ["Located", "Share"]


class Located:
    """Operations by location, loads apart: they may meet each other (rule 2)."""

    def __init__(self) -> None:
        self.writes: Names[Op] = Names()
        self.loads: Names[Op] = Names()

    def add(self, op: Op) -> None:
        """Take in *op*, under each of its keys."""
        for key in op.keys:
            self._names(op).add(key, op.id, op)

    def discard(self, op: Op) -> None:
        """Let go of *op*, if it is there."""
        for key in op.keys:
            self._names(op).discard(key, op.id)

    def meeting(self, op: Op) -> list[OrderedDict[int, Op]]:
        """Return, location by location, the operations that must not run beside *op*; itself, too."""
        if op.kind is not Kind.LOAD:
            return self.writes.related(op.key) + self.loads.related(op.key)
        return [found for key in op.keys for found in self.writes.related(key)]

    def _names(self, op: Op) -> Names[Op]:
        return self.loads if op.kind is Kind.LOAD else self.writes


class Share:
    """The live operations of one lane."""

    def __init__(self, lane: Lane) -> None:
        self.live: OrderedDict[int, Op] = OrderedDict()
        self.waiting: OrderedDict[int, Op] = OrderedDict()  # saves that are not admitted
        self.accepted: OrderedDict[int, Op] = OrderedDict()  # saves and links
        self.accepted_saves = 0
        self.cautious = 0  # removals that came after a failure
        self.slots = Slots(lane.max_concurrent_saves)
