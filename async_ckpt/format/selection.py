"""Parts of a state by name. Pure.

A path is made of the keys of nested mappings and the positions in nested lists, joined by dots:
``state_dict.layer1.weight``, ``optimizer_states.0.state.3.exp_avg``. A pattern is a path as it is, or what
``fnmatch`` takes, where ``*`` stands for dots as well; one that matches a path takes everything below it.

What does not belong here: what the values are.
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


def as_patterns(keys: str | Sequence[str]) -> tuple[str, ...]:
    """Return the patterns in *keys*.

    Raises:
        OptionError: there are none, or one is no text.
    """
    patterns = (keys,) if isinstance(keys, str) else tuple(keys)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"keys={keys!r}: must be a pattern, such as 'state_dict.*', or a sequence of them")
    return patterns


def part_of(state: Any, patterns: Sequence[str]) -> Any:
    """Return *state* with nothing but the values whose paths match, nested as they were.

    Mappings keep their type, their attributes and the order of their keys. Lists and tuples become shorter.
    *state* itself does not change.

    Raises:
        KeyError: a pattern matches nothing.
    """
    paths = dict.fromkeys(_paths(state, "", ()))
    exact = frozenset(patterns)
    wild = {pattern: re.compile(translate(pattern)) for pattern in exact if not _WILD.isdisjoint(pattern)}
    for pattern in patterns:
        if pattern not in paths and not (pattern in wild and any(map(wild[pattern].match, paths))):
            raise KeyError(_nothing(pattern, list(paths)))

    def matches(path: str) -> bool:
        return path in exact or any(each.match(path) for each in wild.values())

    return _pruned(state, "", (), matches)[0]


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _paths(value: Any, path: str, around: tuple[int, ...]) -> Iterator[str]:
    """Return every path in *value*; one that leads back to what is *around* it is not followed."""
    if id(value) in around:
        return
    for key, inner in _items(value):
        below = f"{path}.{key}" if path else str(key)
        yield below
        yield from _paths(inner, below, (*around, id(value)))


def _pruned(
    value: Any, path: str, around: tuple[int, ...], matches: Callable[[str], bool]
) -> tuple[Any, ...]:
    """Return what is left of *value*, or nothing."""
    if path and matches(path):
        return (value,)
    if id(value) in around:
        return ()
    kept = {}
    for key, inner in _items(value):
        below = f"{path}.{key}" if path else str(key)
        for left in _pruned(inner, below, (*around, id(value)), matches):
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
    return f"keys={pattern!r} matches nothing in the checkpoint; the nearest are {', '.join(map(repr, near))}"
