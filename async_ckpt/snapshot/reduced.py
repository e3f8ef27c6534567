"""The inert form of an object: what pickle would be told about it, and nothing of what it does.

Guarantees: to lay out a file no constructor, ``__setstate__`` or rebuild function of the state ever
runs: such code could read tensors that are stand-ins, move data to a device or have side effects.
A `Reduced` pickles to the very bytes that its original would have pickled to.

A skeleton calls `reduced` for every object that is not a plain builtin; whoever unpickles a skeleton
decides what the call means: a `Reduced`, or the object itself.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

__all__ = ["Reduced", "apply_state", "call", "reduce", "reduced", "set_state"]

PROTOCOL = 2  # what torch.save asks objects for


class Reduced:
    """An object as the parts that its ``__reduce_ex__`` returned."""

    __slots__ = ("arguments", "function", "has_state", "items", "pairs", "setter", "state")

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.state: Any = None
        self.has_state = False
        self.setter: Any = None
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pickle insists that __newobj__ is given the object's own class
        if getattr(self.function, "__name__", "") in ("__newobj__", "__newobj_ex__"):
            return self.arguments[0]  # type: ignore[no-any-return]
        return Reduced

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Exist, since pickle insists that what rebuilds an object is callable."""
        raise TypeError("an inert object cannot be called")

    def __setstate__(self, state: Any) -> None:
        self.state = state
        self.has_state = True

    def append(self, item: Any) -> None:
        """Note a list item."""
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        """Note list items."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs.append((key, value))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        value = (
            self.function,
            self.arguments,
            self.state if self.has_state else None,
            iter(self.items) if self.items else None,
            iter(self.pairs) if self.pairs else None,
        )
        return value if self.setter is None else (*value, self.setter)


def reduced(function: Any, arguments: Any) -> Any:
    """Mark in a skeleton where an object was; read as `Reduced` when inert, as `call` when live."""
    return Reduced(function, arguments)


def set_state(target: Any, setter_and_state: Any) -> None:
    """Mark in a skeleton a state with a setter of its own; `apply_state` when live."""
    target.setter, target.state = setter_and_state
    target.has_state = True


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Rebuild an object for real."""
    return function(*arguments)


def apply_state(target: Any, setter_and_state: Any) -> None:
    """Give an object its state for real."""
    setter, state = setter_and_state
    setter(target, state)


def reduce(obj: Any) -> Any:
    """Return a reduce value for *obj* that goes through `reduced`, for ``Pickler.reducer_override``.

    Args:
        obj: anything that pickle has no opcode for.

    Returns:
        The value; ``NotImplemented`` or a string for what pickle stores by name.
    """
    cls = type(obj)
    function = copyreg.dispatch_table.get(cls)
    if function is not None:
        value = function(obj)
    elif cls is FunctionType or issubclass(cls, type):
        return NotImplemented
    else:
        value = obj.__reduce_ex__(PROTOCOL)
    if not (isinstance(value, tuple) and 2 <= len(value) <= 6 and callable(value[0])):
        return value  # a name, or what pickle will refuse with a good message
    if not isinstance(value[1], tuple):
        return value
    head = (reduced, value[:2])
    if len(value) == 6 and value[5] is not None and value[2] is not None:
        return (*head, (value[5], value[2]), *value[3:5], set_state)
    return head + value[2:5]
