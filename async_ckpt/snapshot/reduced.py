"""The inert form of an object: what pickle would be told about it, and nothing of what it does.

Guarantees: to lay out a file no constructor, ``__setstate__`` or rebuild function of the state ever
runs: such code could read tensors that are stand-ins, move data to a device or have side effects.
A `Reduced` pickles to the very bytes that its original would have pickled to.

A skeleton calls `reduced` for every object that is not a plain builtin; whoever unpickles a skeleton
decides what the call means: a `Reduced`, or the object itself.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

__all__ = ["Reduced", "apply_state", "call", "reduce", "reduced", "set_state"]

PROTOCOL = 2  # what torch.save asks objects for


class Reduced:
    """An object as the parts that its ``__reduce_ex__`` returned."""

    __slots__ = ("arguments", "function", "items", "pairs", "setter", "state")

    def __init__(self, function: Any, arguments: Any) -> None:
        self.function = function
        self.arguments = arguments
        self.state: Any = None
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
            self.state,
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

    Raises:
        PicklingError: pickle would refuse what *obj* says about itself, once the file is laid out.
    """
    cls = type(obj)
    function = copyreg.dispatch_table.get(cls)
    if function is not None:
        value = function(obj)
    elif cls is FunctionType or issubclass(cls, type):
        value = NotImplemented
    else:
        value = obj.__reduce_ex__(PROTOCOL)
    if value is NotImplemented or isinstance(value, str):
        pickle.dumps(obj, PROTOCOL)  # which knows fewer names: only ASCII, none that leads through a module
        return value
    if not (isinstance(value, tuple) and 2 <= len(value) <= 6 and callable(value[0])):
        return value  # pickle will refuse it with a good message
    if not isinstance(value[1], tuple):
        return value
    _check_new(obj, *value[:2])
    head = (reduced, value[:2])
    if len(value) == 6 and value[5] is not None and value[2] is not None:
        if not callable(value[5]):
            raise pickle.PicklingError("the sixth item of what __reduce__ returned is not a function")
        return (*head, (value[5], value[2]), *value[3:5], set_state)
    return head + value[2:5]


def _check_new(obj: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    """Refuse what pickle has no opcode for; it does not get to see that *function* makes new objects."""
    name = getattr(function, "__name__", "")
    if name == "__newobj__":
        fits = arguments and arguments[0] is obj.__class__
    elif name == "__newobj_ex__":
        kinds = (type, tuple, dict)
        fits = len(arguments) == len(kinds) and all(map(isinstance, arguments, kinds))
    else:
        return
    if not fits:
        raise pickle.PicklingError(f"its class and what it gives to {name} do not fit")
