"""A save, or a removal, of a Trainer that has run nothing yet: no hook has told the companion, so it is told here.

``Trainer.save_checkpoint(path, weights_only=True)`` calls no callback at all, and the plugin is handed a state and a
path. That a Trainer is saving, and which, is seen on the stack alone.

Guarantees: looked for until a plugin has a companion; where none ever comes, it is a walk over a few frames a call.

What does not belong here: what the companion does.
"""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["let_companion_know"]

# Of Lightning's functions, the variable that holds the Trainer.
_HOLDERS = {"save_checkpoint": "self", "_remove_checkpoint": "trainer"}


def let_companion_know() -> None:
    """Tell the companion of the Trainer that is saving or removing now, if there are both."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get(_HOLDERS.get(frame.f_code.co_name, ""))
        for callback in getattr(trainer, "callbacks", None) or ():
            take_charge = getattr(callback, "take_charge", None)
            if callable(take_charge):
                take_charge(trainer)
        frame = frame.f_back
