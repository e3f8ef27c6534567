"""How a base CheckpointIO is called: where its arguments are, whatever it calls them.

What does not belong here: calling it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from async_ckpt.errors import UnknownProtocolError
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location

__all__ = ["argument", "place_of", "slot_of"]


def slot_of(
    method: Any, position: int, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | str:
    """Tell where a call carries an argument: at which place, or under which name, which may be the base's own."""
    if position < len(args):
        return position
    if name in kwargs:
        return name
    own_name = list(inspect.signature(method).parameters)[position]
    if own_name not in kwargs:
        raise TypeError(f"{method.__qualname__}() needs the argument {own_name!r}")
    return own_name


def argument(slot: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument that is carried at *slot*."""
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def place_of(path: Any, *, follow: bool = True) -> Location:
    """Return the location of *path*, or one of its own kind where only the base knows what it means."""
    try:
        return locate(path, follow=follow)
    except (UnknownProtocolError, TypeError):
        return Location(url=str(path), path=str(path), key=f"base:{path}", group="base")
