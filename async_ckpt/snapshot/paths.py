"""Finds where in a state a storage is, after a save of it has failed: the state itself is no longer at hand.

The skeleton is read as pickle would, but nothing that it names is looked up or called (S1: no code of the state runs).
Where that leads nowhere, there is no path. What does not belong here: the message.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from async_ckpt.snapshot.contents import Content, Objects, Unfilled
from async_ckpt.snapshot.entries import Entry, StorageEntry, TensorEntry

__all__ = ["path_of"]


def path_of(content: Content | None, storage: int) -> str | None:
    """Return the path to the first tensor over a storage, such as ``state['model']['weight']``."""
    if isinstance(content, Unfilled):
        skeleton, entries = content.skeleton.pickle, content.skeleton.entries.listed()
    elif isinstance(content, Objects):
        skeleton, entries = content.skeleton, content.entries.listed()
    else:
        return None
    try:
        state = _Outline(skeleton, entries).load()
        return next((path for path, found in _walk(state) if found == storage), None)
    except Exception:  # whatever stands in the way of a better message
        return None


class _Storage(int):
    """Stands for a tensor over the storage of this number, or for the storage."""


class _Object:
    """Stands for an object, a class or a function."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.parts: list[tuple[str, Any]] = []

    def __new__(cls, *arguments: Any, **more: Any) -> _Object:
        return object.__new__(cls)

    def __call__(self, *arguments: Any, **more: Any) -> _Object:
        return _Object()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.parts += [(f".{name}", value) for name, value in state.items()]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append((f"[{key!r:.80}]", value))

    def append(self, value: Any) -> None:
        """Take an item of a list."""
        self.parts.append((f"[{len(self.parts)}]", value))

    def extend(self, values: Any) -> None:
        """Take items of a list."""
        for value in values:
            self.append(value)


class _Outline(pickle.Unpickler):
    def __init__(self, skeleton: bytes, entries: Sequence[Entry]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._entries = entries

    def find_class(self, module: str, name: str, /) -> Any:
        return _Object

    def persistent_load(self, number: Any, /) -> Any:
        entry = self._entries[number]
        if isinstance(entry, (TensorEntry, StorageEntry)):
            return _Storage(entry.storage)
        value = getattr(entry, "value", None)
        return value if isinstance(value, (str, bytes)) else _Object


def _walk(state: Any) -> Iterator[tuple[str, int]]:
    open_, seen = [("state", state)], set()
    while open_:
        path, value = open_.pop()
        if isinstance(value, _Storage):
            yield path, int(value)
        elif id(value) not in seen:
            seen.add(id(value))
            open_ += reversed([(path + step, part) for step, part in _parts(value)])


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r:.80}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, _Object):
        yield from value.parts
