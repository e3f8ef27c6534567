"""Notifies the companion callback of a save or removal by a Trainer that has run nothing, and so called no hook.

``Trainer.save_checkpoint(path, weights_only=True)`` calls no callback at all, and the plugin is given only a state and
a path. Which Trainer is saving can only be seen on the stack.

Guarantees: the stack is searched until the plugin has a callback; without one, each call costs a walk over a few
frames.

What does not belong here: what the callback does.
"""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["notify_companion"]

# Lightning's functions, and their local variable that holds the Trainer.
_HOLDERS = {"save_checkpoint": "self", "_remove_checkpoint": "trainer"}


def notify_companion() -> None:
    """Notify the companion callback of the Trainer that is saving or removing now, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get(_HOLDERS.get(frame.f_code.co_name, ""))
        for callback in getattr(trainer, "callbacks", None) or ():
            take_charge = getattr(callback, "take_charge", None)
            if callable(take_charge):
                take_charge(trainer)
        frame = frame.f_back
