"""Temporary overrides of attributes of single objects, by which a fit's coordinator intercepts calls within a Trainer.

Guarantees: classes do not change, so no other Trainer is affected; the original values are restored, newest override
first, except where other code has replaced the override since.

What does not belong here: the replacements.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

__all__ = ["Overrides", "Replacement"]

_ABSENT = object()


class Overrides:
    """The overrides of one fit or strategy."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Override an attribute of *owner* until ``restore``."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._undo.callback(_put_back, owner, name, value, before)

    def restore(self) -> None:
        """Restore all attributes; calling it again does nothing."""
        self._undo.close()


def _put_back(owner: Any, name: str, value: Any, before: Any) -> None:
    if vars(owner).get(name) is not value:
        return  # replaced since, as when ModelCheckpoint is set up again
    if before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


class Replacement:
    """Replaces a method of *owner*; a copy of *owner* has the original method.

    Args:
        owner: the object.
        name: the name of the method.
        method: called instead.
        by: the plugin that has replaced it.
    """

    def __init__(self, owner: Any, name: str, method: Callable[..., Any], *, by: Any = None) -> None:
        self._owner = owner
        self._name = name
        self._method = method
        self.by = by

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self._method(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)
