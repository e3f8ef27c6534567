"""The live operations of one lane.

What does not belong here: which of them may run (queue).
"""

from __future__ import annotations

from collections import OrderedDict

from async_ckpt.engine.queue.operation import Lane, Op
from async_ckpt.engine.queue.slots import Slots

__all__ = ["LaneState"]


class LaneState:
    """The live operations of one lane."""

    def __init__(self, lane: Lane) -> None:
        self.live: OrderedDict[int, Op] = OrderedDict()
        self.waiting: OrderedDict[int, Op] = OrderedDict()  # saves that are not admitted
        self.accepted: OrderedDict[int, Op] = OrderedDict()  # saves and links
        self.accepted_saves = 0
        self.after_failure = 0  # removals that came after a failure
        self.slots = Slots(lane.max_concurrent_saves)
