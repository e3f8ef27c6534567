"""What has to be known of a base CheckpointIO: which ones we take, where a call carries what, who writes in its place.

What does not belong here: when it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from async_ckpt.errors import OptionError, UnknownProtocolError
from async_ckpt.lightning.desk import MakeWriter
from async_ckpt.redaction import redacted_url
from async_ckpt.service import CheckpointService
from async_ckpt.stores import locate
from async_ckpt.stores.base import Location
from async_ckpt.writers import DelegatingWriter

__all__ = ["argument", "delegating", "place_of", "refuse_unfit", "slot_of"]


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


def place_of(path: Any) -> Location:
    """Return the location of the name *path*, or one of its own kind where only the base knows what it means."""
    try:
        return locate(path, follow=False)
    except (UnknownProtocolError, TypeError):
        text = str(path)
        return Location(url=redacted_url(text), path=text, key=f"base:{text}", group="base", address=text)


def delegating(place: Location, *, save: Any = None, delete: Any = None) -> MakeWriter:
    """Return what makes a base's writer."""

    def make(service: CheckpointService) -> DelegatingWriter:
        return DelegatingWriter(
            save=save,
            delete=delete,
            group=place.group,
            workers=service.workers(),
            durability=service.options.durability,
        )

    return make


def refuse_unfit(base: Any) -> None:
    """Refuse what is no CheckpointIO, and one that returns before it has written: that is not durable (D1)."""
    inner = base
    while inner is not None and not isinstance(inner, type):
        if any(kind.__name__ == "AsyncCheckpointIO" for kind in type(inner).__mro__):
            raise OptionError(
                f"{type(inner).__module__}.{type(inner).__name__} is asynchronous itself; "
                "give AsyncCheckpointIO what that writes with, or nothing"
            )
        inner = getattr(inner, "checkpoint_io", None)
    if isinstance(base, type) or (base is not None and not hasattr(base, "save_checkpoint")):
        kind = base if isinstance(base, type) else type(base)  # no more: it may be, or hold, a secret
        raise OptionError(
            f"checkpoint_io=<{kind.__name__}>: must be a CheckpointIO, such as TorchCheckpointIO(), or None"
        )
