"""What has to be known of a base CheckpointIO: which ones we take, where a call carries what, who writes in its place.

What does not belong here: when it is called.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from async_ckpt.engine.writers import DelegatingWriter
from async_ckpt.errors import AsyncCheckpointError, OptionError
from async_ckpt.lightning.session import MakeWriter
from async_ckpt.options import ServiceOptions
from async_ckpt.service import CheckpointService
from async_ckpt.stores import locate, refuse_mangled
from async_ckpt.stores.base import Location
from async_ckpt.stores.redaction import redacted_url

__all__ = [
    "argument",
    "delegating",
    "layers_of",
    "pin_path",
    "pinned",
    "place_of",
    "refuse_unfit",
    "refuse_void",
    "slot_of",
]

_MOST_LAYERS = 32

# Options that only our own writer knows, and what they come to.
_VOID: dict[str, Callable[[ServiceOptions], Any]] = {
    "part_size": lambda options: options.part_size_bytes,
    "max_concurrent_parts": lambda options: options.max_concurrent_parts,
    "retry": lambda options: options.retry,
    "in_place": lambda options: options.in_place,
    "storage_options": lambda options: options.storage_options,
}


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


def pin_path(
    method: Any, position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the path that a call carries, and the call with that path as it means the same later (`pinned`)."""
    slot = slot_of(method, position, "path", args, kwargs)
    path = argument(slot, args, kwargs)
    if isinstance(slot, int):
        return path, (*args[:slot], pinned(path), *args[slot + 1 :]), dict(kwargs)
    return path, args, {**kwargs, slot: pinned(path)}


def argument(slot: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument that is carried at *slot*."""
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def place_of(path: Any) -> Location:
    """Return the location of the name *path*, or one of its own kind where only the base knows what it means."""
    try:
        return locate(path, follow=False)
    except (
        AsyncCheckpointError,
        TypeError,
        ValueError,
    ):  # fsspec may know the protocol, and nothing more of it
        text = str(path)
        return Location(url=redacted_url(text), path=text, key=f"base:{text}", group="base", address=text)


def pinned(path: Any) -> Any:
    """Return *path* so that it means the same in another working directory; of the same kind, if that can be."""
    if isinstance(path, str):
        return _pinned(path)
    if not isinstance(path, os.PathLike):
        return path
    text = os.fspath(path)
    if not isinstance(text, str) or (absolute := _pinned(text)) == text:
        return path
    return type(path)(absolute) if isinstance(path, PurePath) else absolute


def _pinned(path: str) -> str:
    scheme, separator, local = path.rpartition("://")
    if separator and scheme not in ("file", "local"):
        return path
    if not local.strip() or local.startswith(("/", "~")) or "::" in path or _lost_slash(path):
        return path
    return f"{scheme}{separator}{os.path.join(os.getcwd(), local)}"


def _lost_slash(path: str) -> bool:
    """Return whether *path* was a URL once, which the base may know how to mend."""
    try:
        refuse_mangled(path)
    except OptionError:
        return True
    return False


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


def layers_of(base: Any) -> Iterator[Any]:
    """Yield *base* and what it wraps, from outside in; not for ever, as an object may have any attribute."""
    for _ in range(_MOST_LAYERS):
        if base is None or isinstance(base, type):
            return
        yield base
        base = getattr(base, "checkpoint_io", None)


def refuse_unfit(base: Any) -> None:
    """Refuse what is no CheckpointIO, and one that returns before it has written: that is not durable (D1)."""
    for inner in layers_of(base):
        if any(kind.__name__ == "AsyncCheckpointIO" for kind in type(inner).__mro__):
            raise OptionError(
                f"{type(inner).__module__}.{type(inner).__name__} is asynchronous itself; "
                "give AsyncCheckpointIO what that writes with, or nothing"
            )
    if isinstance(base, type) or (base is not None and not hasattr(base, "save_checkpoint")):
        kind = base if isinstance(base, type) else type(base)  # no more: it may be, or hold, a secret
        raise OptionError(
            f"checkpoint_io=<{kind.__name__}>: must be a CheckpointIO, such as TorchCheckpointIO(), or None"
        )


def refuse_void(base: Any, options: Mapping[str, Any]) -> None:
    """Refuse the options that a base, which writes by itself, would make void; their defaults say nothing.

    Raises:
        OptionError: there is such an option.
    """
    given = ServiceOptions.of({name: options[name] for name in _VOID if name in options})
    void = [
        name for name, value in _VOID.items() if (value(given) or None) != (value(ServiceOptions()) or None)
    ]
    if options.get("store_factory") is not None:
        void.append("store_factory")
    if void:
        raise OptionError(
            f"{', '.join(void)}: {type(base).__name__} writes by itself and cannot honour that; "
            "set it on the base, or give AsyncCheckpointIO no base"
        )
