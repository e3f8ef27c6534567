"""Attributes of single objects, replaced for a while: how the companion comes between the parts of a Trainer.

Guarantees: classes stay as they are, so no other Trainer is concerned; what was there is put back, newest first,
except where somebody else has replaced it since.

What does not belong here: what comes in between.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

__all__ = ["Overrides"]

_NOTHING = object()


class Overrides:
    """What has been replaced, and by what."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of *owner*, until ``restore``."""
        before = vars(owner).get(name, _NOTHING)
        setattr(owner, name, value)
        self._undo.callback(_put_back, owner, name, value, before)

    def restore(self) -> None:
        """Put everything back; again does nothing."""
        self._undo.close()


def _put_back(owner: Any, name: str, value: Any, before: Any) -> None:
    if vars(owner).get(name) is not value:
        return  # as when ModelCheckpoint is set up again
    if before is _NOTHING:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
