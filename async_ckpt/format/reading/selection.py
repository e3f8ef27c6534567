"""Selects parts of a state by name. Pure.

A path consists of the keys of nested mappings and the positions in nested lists, joined by dots:
``state_dict.layer1.weight``, ``optimizer_states.0.state.3.exp_avg``. A pattern is a literal path or an ``fnmatch``
pattern, whose ``*`` matches dots, too; a match includes everything below the path.

Guarantees: a malicious state, whose values contain each other many times over, is refused before its paths fill the
memory.

What does not belong here: the meaning of the values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import translate
from typing import Any

from async_ckpt.errors import OptionError

__all__ = ["as_patterns", "part_of"]

_WILD = frozenset("*?[")
_SUGGESTIONS = 3
_MOST_COMPARED = 20_000  # paths; difflib takes about 10 µs for each
_MOST_TIMES = 16  # that all values together may be met on different paths, beside
_MOST_MORE = 1 << 20  # values that are met more often


def as_patterns(keys: str | Sequence[str]) -> tuple[str, ...]:
    """Return the patterns in *keys*.

    Raises:
        OptionError: there are none, or one is not a str.
    """
    patterns = (keys,) if isinstance(keys, str) else tuple(keys)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"keys={keys!r}: must be a pattern, such as 'state_dict.*', or a sequence of them")
    return patterns


def part_of(state: Any, patterns: Sequence[str]) -> Any:
    """Return *state* with only the values whose paths match, nested as they were.

    Mappings keep their type, their attributes and the order of their keys. Lists and tuples become shorter.
    *state* itself does not change.

    Raises:
        KeyError: a pattern matches nothing.
        ValueError: the values contain each other so often that there are far more paths than values.
    """
    exact = frozenset(patterns)
    wild = {pattern: re.compile(translate(pattern)) for pattern in exact if not _WILD.isdisjoint(pattern)}
    walk = _Walk()
    paths: list[str] = []
    missing = set(exact)
    unmet = dict(wild)
    for path in walk.paths(state, "", ()):
        if len(paths) < _MOST_COMPARED:
            paths.append(path)
        met = {path, *(pattern for pattern, each in unmet.items() if each.match(path))}
        if not met.isdisjoint(missing):
            missing -= met
            unmet = {pattern: each for pattern, each in unmet.items() if pattern in missing}
            if not missing:
                break
    for pattern in patterns:
        if pattern in missing:
            raise KeyError(_nothing(pattern, paths))

    def matches(path: str) -> bool:
        return path in exact or any(each.match(path) for each in wild.values())

    return walk.pruned(state, "", (), matches)[0]


class _Walk:
    """A walk over a state, path by path."""

    def __init__(self) -> None:
        self._left = _MOST_MORE
        self._seen: set[int] = set()

    def _look_into(self, value: Any, around: tuple[int, ...]) -> Iterable[tuple[Any, Any]]:
        """Return the items of a container; none for one that contains something *around* it."""
        if id(value) in around or not isinstance(value, (dict, list, tuple)):
            return ()
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._left += _MOST_TIMES * len(value)
        self._left -= len(value)
        if self._left < 0:
            raise ValueError("the checkpoint's values contain each other too many times over to be searched")
        return value.items() if isinstance(value, dict) else enumerate(value)

    def paths(self, value: Any, path: str, around: tuple[int, ...]) -> Iterator[str]:
        """Yield every path in *value*."""
        for key, inner in self._look_into(value, around):
            below = f"{path}.{key}" if path else str(key)
            yield below
            yield from self.paths(inner, below, (*around, id(value)))

    def pruned(
        self, value: Any, path: str, around: tuple[int, ...], matches: Callable[[str], bool]
    ) -> tuple[Any, ...]:
        """Return the selected part of *value*, or nothing."""
        if path and matches(path):
            return (value,)
        kept = {}
        for key, inner in self._look_into(value, around):
            below = f"{path}.{key}" if path else str(key)
            for left in self.pruned(inner, below, (*around, id(value)), matches):
                kept[key] = left
        if not kept:
            return ()
        if not isinstance(value, dict):
            return (list(kept.values()) if isinstance(value, list) else tuple(kept.values()),)
        part = copy.copy(value)
        part.clear()
        part.update(kept)
        return (part,)


def _nothing(pattern: str, paths: Sequence[str]) -> str:
    near = get_close_matches(pattern, paths[:_MOST_COMPARED], n=_SUGGESTIONS, cutoff=0.0)
    if not near:
        return f"keys={pattern!r} matches nothing: the checkpoint is neither a mapping nor a list"
    similar = ", ".join(map(repr, near))
    return f"keys={pattern!r} matches nothing in the checkpoint; the most similar paths are {similar}"
