"""Checks a base CheckpointIO, and finds the path among the arguments of its calls.

What does not belong here: when a base is called.
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
    "absolute",
    "argument",
    "argument_slot",
    "check_base",
    "delegating_writer",
    "layers_of",
    "location_of_path",
    "refuse_ignored_options",
    "with_absolute_path",
]

_MOST_LAYERS = 32

# Options that only our own writer uses, and how to get their effective values.
_VOID: dict[str, Callable[[ServiceOptions], Any]] = {
    "part_size": lambda options: options.part_size_bytes,
    "priority": lambda options: options.priority,
    "max_concurrent_parts": lambda options: options.max_concurrent_parts,
    "retry": lambda options: options.retry,
    "in_place": lambda options: options.in_place,
    "page_cache": lambda options: options.page_cache,
    "storage_options": lambda options: options.storage_options,
}


def argument_slot(
    method: Any, position: int, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | str:
    """Return the position or the name by which a call passes an argument; the base may use a name of its own."""
    if position < len(args):
        return position
    if name in kwargs:
        return name
    own_name = list(inspect.signature(method).parameters)[position]
    if own_name not in kwargs:
        raise TypeError(f"{method.__qualname__}() needs the argument {own_name!r}")
    return own_name


def with_absolute_path(
    method: Any, position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return the path that a call passes, and the arguments with that path made `absolute`."""
    slot = argument_slot(method, position, "path", args, kwargs)
    path = argument(slot, args, kwargs)
    if isinstance(slot, int):
        return path, (*args[:slot], absolute(path), *args[slot + 1 :]), dict(kwargs)
    return path, args, {**kwargs, slot: absolute(path)}


def argument(slot: int | str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument at *slot*, a position or a name."""
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def location_of_path(path: Any) -> Location:
    """Return the location of *path*; in the group ``"base"`` if only the base understands it."""
    try:
        return locate(path, follow=False)
    except (
        AsyncCheckpointError,
        TypeError,
        ValueError,
    ):  # also raised by fsspec for a URL that it cannot parse
        text = str(path)
        return Location(url=redacted_url(text), path=text, key=f"base:{text}", group="base", address=text)


def absolute(path: Any) -> Any:
    """Return *path* independent of the working directory; of the same type, if possible."""
    if isinstance(path, str):
        return _absolute(path)
    if not isinstance(path, os.PathLike):
        return path
    text = os.fspath(path)
    if not isinstance(text, str) or (absolute := _absolute(text)) == text:
        return path
    return type(path)(absolute) if isinstance(path, PurePath) else absolute


def _absolute(path: str) -> str:
    scheme, separator, local = path.rpartition("://")
    if separator and scheme not in ("file", "local"):
        return path
    if not local.strip() or local.startswith(("/", "~")) or "::" in path or _lost_slash(path):
        return path
    return f"{scheme}{separator}{os.path.join(os.getcwd(), local)}"


def _lost_slash(path: str) -> bool:
    """Return whether *path* was a URL that lost a slash; the base may be able to repair it."""
    try:
        refuse_mangled(path)
    except OptionError:
        return True
    return False


def delegating_writer(location: Location, *, save: Any = None, delete: Any = None) -> MakeWriter:
    """Return a factory for the writer that calls a base."""

    def make(service: CheckpointService) -> DelegatingWriter:
        return DelegatingWriter(
            save=save,
            delete=delete,
            group=location.group,
            workers=service.workers(),
            durability=service.options.durability,
        )

    return make


def layers_of(base: Any) -> Iterator[Any]:
    """Yield *base* and the CheckpointIOs that it wraps, outermost first; a bounded number of them."""
    for _ in range(_MOST_LAYERS):
        if base is None or isinstance(base, type):
            return
        yield base
        base = getattr(base, "checkpoint_io", None)


def check_base(base: Any) -> None:
    """Refuse an object that is not a CheckpointIO, and a CheckpointIO that returns before it has written (D1)."""
    for inner in layers_of(base):
        if any(kind.__name__ == "AsyncCheckpointIO" for kind in type(inner).__mro__):
            raise OptionError(
                f"{type(inner).__module__}.{type(inner).__name__} is asynchronous itself; "
                "give AsyncCheckpointIO the CheckpointIO that it writes with, or none"
            )
    if isinstance(base, type) or (base is not None and not hasattr(base, "save_checkpoint")):
        kind = base if isinstance(base, type) else type(base)  # not its repr, which may contain a secret
        raise OptionError(
            f"checkpoint_io=<{kind.__name__}>: must be a CheckpointIO, such as TorchCheckpointIO(), or None"
        )


def refuse_ignored_options(base: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that have no effect with a base, as it writes by itself; default values are allowed.

    Raises:
        OptionError: such an option is set.
    """
    given = ServiceOptions.of({name: options[name] for name in _VOID if name in options})
    void = [
        name for name, value in _VOID.items() if (value(given) or None) != (value(ServiceOptions()) or None)
    ]
    if options.get("store_factory") is not None:
        void.append("store_factory")
    if void:
        raise OptionError(
            f"{', '.join(void)}: has no effect, because {type(base).__name__} writes the files; "
            "set it on that base, or give AsyncCheckpointIO no base"
        )
