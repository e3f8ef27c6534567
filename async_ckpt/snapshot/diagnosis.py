"""Finds the object in a state that pickle refuses.

Runs only after a failure, so it may be slow: it pickles child after child, and descends into those that fail. It
follows the references that pickle follows, not all attributes of an object.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from async_ckpt.snapshot.pickler import PROTOCOL

__all__ = ["Unpicklable", "find_unpicklable"]

_Children: TypeAlias = Iterator[tuple[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpicklable:
    """An innermost object that cannot be pickled.

    Attributes:
        where: the path to it, such as ``state['callbacks'][0].lock``.
        value: the object.
        error: pickle's error.
    """

    where: str
    value: Any
    error: Exception


def find_unpicklable(
    state: Any, error: Exception, probe: Callable[[Any], Exception | None], *, into_objects: bool = True
) -> list[Unpicklable]:
    """Find the objects that made pickling *state* fail.

    Args:
        state: the state that was pickled.
        error: the error.
        probe: pickles an object, and returns the error or ``None``.
        into_objects: whether to descend into objects, not only into builtin containers.

    Returns:
        The innermost failing objects, in the order of the state; at least one.
    """
    if isinstance(error, RecursionError):
        return [Unpicklable(where="state", value=state, error=error)]
    found: list[Unpicklable] = []
    seen = {id(state): state}  # and alive: what a __reduce__ has made leaves its id to the next
    open_ = [Unpicklable(where="state", value=state, error=error)]
    while open_:
        parent = open_.pop()
        failing: list[Unpicklable] = []
        for where, child in _children(parent, into_objects):
            if id(child) not in seen:
                reason = probe(child)
                if reason is not None:
                    seen[id(child)] = child
                    failing.append(Unpicklable(where=where, value=child, error=reason))
        if failing:
            open_.extend(reversed(failing))
        else:
            found.append(parent)
    return found


def _children(parent: Unpicklable, into_objects: bool) -> _Children:
    try:
        yield from _parts(parent, into_objects)
    except Exception:  # maybe the very reason, and the probe has it already; we look no further
        return


def _parts(parent: Unpicklable, into_objects: bool) -> _Children:
    where, value = parent.where, parent.value
    kind = type(value)
    if kind is dict:
        yield from _of_pairs(where, value.items())
    elif kind in (list, tuple):
        yield from _of_items(where, value)
    elif kind in (set, frozenset):
        yield from ((f"{where} (element {item!r:.80})", item) for item in value)
    elif into_objects and not isinstance(value, type):
        yield from _of_reduced(where, value)


def _of_pairs(where: str, pairs: Any) -> _Children:
    for key, value in pairs:
        yield f"{where} (key {key!r:.80})", key
        yield f"{where}[{key!r:.80}]", value


def _of_items(where: str, items: Any) -> _Children:
    return ((f"{where}[{index}]", item) for index, item in enumerate(items))


def _of_reduced(where: str, value: Any) -> _Children:
    reducer = copyreg.dispatch_table.get(type(value))
    parts = value.__reduce_ex__(PROTOCOL) if reducer is None else reducer(value)
    if not isinstance(parts, tuple):
        return
    _, arguments, state, items, pairs, *_ = (*parts, None, None, None, None)
    for index, argument in enumerate(arguments):
        yield f"{where} (argument {index} of its __reduce__)", argument
    for attributes in state if isinstance(state, tuple) else (state,):
        if isinstance(attributes, dict):
            yield from ((f"{where}.{name}", attribute) for name, attribute in attributes.items())
        elif attributes is not None:
            yield f"{where} (its __getstate__)", attributes
    if items is not None:
        yield from _of_items(where, items)
    if pairs is not None:
        yield from _of_pairs(where, pairs)
