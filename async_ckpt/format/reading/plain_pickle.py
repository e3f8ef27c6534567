"""Checks that a pickle rebuilds its tensors without reading their contents.

Guarantees: nothing in the pickle is imported, called or made; it is read opcode by opcode, in less memory than
``torch.load`` needs. The result is True only if every call is known, and a tensor is passed only to calls that keep it
without reading it: a ``bytearray`` or a size made from a tensor would get the previous content of the memory.

What does not belong here: whether the pickle may be loaded at all; torch decides that.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import torch

__all__ = ["is_plain"]

# The knowledge of a value: one of these; for a looked-up name, a str; for a short text, which may be such a name,
# bytes; for a tuple, the knowledge of its items, none of which is a tuple.
_CONSTANT: Final = 0  # nothing in it comes from a tensor
_BOX: Final = 1  # a container, or an object of a known class: it keeps what is put into it
_HELD: Final = 2  # a tensor, or what may hold one
_Value: TypeAlias = Any

_CONSTANTS = {  # of constants, and of nothing else, they make a constant
    "_codecs": {"encode"},
    "builtins": {"bytearray", "complex", "int", "range", "slice"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "numpy": {"dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
}
_BOXES = {
    "argparse": {"Namespace"},
    "builtins": {"dict", "frozenset", "list", "object", "set", "tuple"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "lightning.fabric.utilities.data": {"AttributeDict"},
    "lightning_fabric.utilities.data": {"AttributeDict"},
}
_NEVER_CALLED = {"numpy": {"ndarray"}, "torch.storage": {"TypedStorage", "UntypedStorage"}}
_REBUILDING = {  # the arguments, beside the first, that may be boxes: hooks, attributes
    "torch._utils._rebuild_parameter": {2},
    "torch._utils._rebuild_parameter_with_state": {2, 3},
    "torch._utils._rebuild_tensor_v2": {5},
}
_RECONSTRUCTOR = "copyreg._reconstructor"
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # by Python 2, whose names protocol 2 has

_OPCODES = {op.name: op for op in pickletools.opcodes}
_STOP, _BINGET, _BINUNICODE, _LONG_BINPUT = (
    ord(_OPCODES[name].code) for name in ("STOP", "BINGET", "BINUNICODE", "LONG_BINPUT")
)

# The usual arguments of `_REBUILD` as torch.save writes them, and the call.
_REBUILD, _HOOKS = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"
_GET, _PUT, _INT = rb"(h.|j.{4})", rb"(q.|r.{4})", rb"(?:K.|M..|J.{4})"
_INTS = rb"(?:\)|(?:I\x85|II\x86|III\x87|\(I{4,8}t)P)".replace(b"I", _INT).replace(b"P", _PUT)
_USUAL = re.compile(
    rb"\(\(" + _GET + _GET + rb"X(.)\0{3}([0-9]{1,9})" + _PUT
    + rb"(?:" + _GET + rb"|X(.)\0{3}([a-z]{1,9}:?[0-9]{0,4})" + _PUT + rb")" + _INT + rb"t" + _PUT + rb"Q"
    + _INT + _INTS + _INTS + rb"[\x88\x89]" + _GET + rb"\)R" + _PUT + rb"t" + _PUT + rb"R",
    re.DOTALL,
)  # fmt: skip
_CONSTANT_BYTES = [0] * 256  # of ops for constants of a fixed length: how many bytes they take
for _op in map(_OPCODES.get, ("NONE", "NEWTRUE", "NEWFALSE", "BININT1", "BININT2", "BININT", "BINFLOAT")):
    assert _op is not None
    _CONSTANT_BYTES[ord(_op.code)] = 1 if _op.arg is None else 1 + _op.arg.n
_SHORT_OP_BYTES = 2
_unpack_4 = struct.Struct("<L").unpack_from


def _flat(names: dict[str, set[str]]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, group in names.items() for name in group)


_MAKE_CONSTANTS, _MAKE_BOXES = _flat(_CONSTANTS), _flat(_BOXES)
_KNOWN = _MAKE_CONSTANTS | _MAKE_BOXES | _flat(_NEVER_CALLED) | _REBUILDING.keys() | {_RECONSTRUCTOR}


def is_plain(pickled: bytes) -> bool:
    """Return whether *pickled*, the pickle of a checkpoint, rebuilds its tensors without reading their contents."""
    try:
        _Reading(pickled).go()
    except (LookupError, ValueError, struct.error):  # torch.load will say what is wrong with it
        return False
    return True


class _NotPlainError(ValueError):
    """The pickle has an operation that is not known here."""


class _Reading:
    """One pass over a pickle; the methods handle single opcodes."""

    def __init__(self, pickled: bytes) -> None:
        self.stack: list[_Value] = []
        self._data = pickled
        self._at = 0
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}

    def go(self) -> None:
        """Read the whole pickle; raise if it is not plain, or not a pickle.

        The most frequent opcodes are handled here, which halves the time.
        """
        data, stack, memo, ops, at = self._data, self.stack, self._memo, _OPS, 0
        while (op := data[at]) != _STOP:
            at += 1
            if op == _LONG_BINPUT:
                memo[_unpack_4(data, at)[0]] = stack[-1]
                at += 4
            elif op == _BINGET:
                value = memo[data[at]]
                at += 1
                if value == _REBUILD and (stop := self._tensor(at)):
                    stack.append(_HELD)
                    at = stop
                else:
                    stack.append(value)
            elif op == _BINUNICODE:
                stack.append(_CONSTANT)
                at += 4 + _unpack_4(data, at)[0]
            elif nbytes := _CONSTANT_BYTES[op]:
                stack.append(_CONSTANT)
                at += nbytes - 1
            else:
                self._at = at
                ops[op](self)
                at = self._at

    def _tensor(self, at: int) -> int:
        """Skip the arguments of `_REBUILD` and the call, if they are the usual ones; return their end, or 0.

        This has the effect of all their opcodes, except for memo entries that are never read.
        """
        found = _USUAL.match(self._data, at)
        if found is None:
            return 0
        word, kind, key_length, key, key_put, place, place_length, place_text, *puts, hooks, put, last = (
            found.groups()
        )
        if len(key) != key_length[0] or (place is None and len(place_text) != place_length[0]):
            return 0
        memo = self._memo
        pid = _tuple([memo[_index(word)], memo[_index(kind)], memo[_index(place)] if place else _CONSTANT])
        if not _is_constant(pid) or memo[_index(hooks)] != _HOOKS:
            return 0
        memo[_index(key_put)] = _CONSTANT  # it stands for other views of the storage, too
        for each in (*puts, put, last):
            if each is not None:
                memo[_index(each)] = _HELD
        return found.end()

    # -- arguments of ops

    def skip(self, nbytes: int) -> int:
        """Skip *nbytes* bytes, and return their offset."""
        start = self._at
        self._at += nbytes  # maybe beyond the end, which `go` will find
        return start

    def number(self, nbytes: int) -> int:
        """Read a number."""
        start = self.skip(nbytes)
        return int.from_bytes(self._data[start : self._at], "little")

    def _line(self) -> str:
        stop = self._data.index(b"\n", self._at)
        start, self._at = self._at, stop + 1
        return self._data[start:stop].decode()

    # -- constants, the stack and the memo

    def sized(self, nbytes: int) -> None:
        """Push a value that is preceded by its length, of *nbytes* bytes."""
        self.skip(self.number(nbytes))
        self.stack.append(_CONSTANT)

    def text(self) -> None:
        """Push a text, which may be a name."""
        start = self.skip(self.number(1))
        self.stack.append(self._data[start : self._at])

    def push(self, value: _Value) -> None:
        """Push a value."""
        self.stack.append(value)

    def duplicate(self) -> None:
        """Push the top of the stack again."""
        self.stack.append(self.stack[-1])

    def mark(self) -> None:
        """Remember the height of the stack."""
        self._marks.append(len(self.stack))

    def pop_mark(self) -> list[_Value]:
        """Pop everything above the last mark."""
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def get(self) -> None:
        """Push the memo entry whose number follows."""
        self.stack.append(self._memo[self.number(4)])

    def put(self) -> None:
        """Memoize the top under the next number."""
        self._memo[self.number(1)] = self.stack[-1]

    def memoize(self) -> None:
        """Memoize the top under the next number."""
        self._memo[len(self._memo)] = self.stack[-1]

    # -- containers

    def tuple_of(self, count: int) -> None:
        """Make a tuple of the top *count* values."""
        if count > len(self.stack):
            raise _NotPlainError("there is too little to take")
        items = self.stack[-count:]
        del self.stack[-count:]
        self.stack.append(_tuple(items))

    def tuple_from_mark(self) -> None:
        """Make a tuple of the values above the mark."""
        items = self.pop_mark()
        self.stack.append(_tuple(items))

    def set_from_mark(self) -> None:
        """Make a frozen set of the values above the mark."""
        self.pop_mark()
        self.stack.append(_BOX)

    def fill(self, count: int) -> None:
        """Put the top *count* values into the container below."""
        for _ in range(count):
            self.stack.pop()
        self._expect_box()

    def fill_from_mark(self) -> None:
        """Put the values above the mark into the container below."""
        self.pop_mark()
        self._expect_box()

    def _expect_box(self) -> None:
        if self.stack[-1] is not _BOX:
            raise _NotPlainError("it puts a value into something that is not a container")

    # -- objects

    def name(self) -> None:
        """Look up a name."""
        module = self._line()
        self._look_up(module, self._line())

    def name_from_stack(self) -> None:
        """Look up a name that is on the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, bytes) or not isinstance(module, bytes):
            raise _NotPlainError("it looks up something that is not a name")
        self._look_up(module.decode(), name.decode())

    def _look_up(self, module: str, name: str) -> None:
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full not in _KNOWN and not (module == "torch" and _is_type(name)):
            raise _NotPlainError(f"it looks up {full}")
        self.stack.append(full)

    def call(self) -> None:
        """Call a function or a class."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, str) or not isinstance(arguments, tuple):
            raise _NotPlainError("it calls something without a name")
        self.stack.append(_result(function, arguments))

    def build(self) -> None:
        """Give an object its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if not (_is_kept(state) if target is _BOX else target is _CONSTANT and _is_constant(state)):
            raise _NotPlainError("it gives a state to an unknown object")

    def storage(self) -> None:
        """Refer to a storage."""
        if not _is_constant(self.stack.pop()):
            raise _NotPlainError("it refers to something that is not a storage")
        self.stack.append(_HELD)


def _index(op: bytes) -> int:
    """Return the memo number in a memo opcode."""
    return op[1] if len(op) == _SHORT_OP_BYTES else int(_unpack_4(op, 1)[0])


def _tuple(items: list[_Value]) -> tuple[_Value, ...]:
    for index, item in enumerate(items):
        if type(item) is tuple:
            items[index] = _CONSTANT if _is_constant(item) else _HELD
    return tuple(items)


def _is_constant(value: _Value) -> bool:
    if type(value) is not tuple:
        return value is not _BOX and value is not _HELD
    return _BOX not in value and _HELD not in value


def _is_kept(value: _Value) -> bool:
    """Return whether *value* may be an attribute: neither it nor, if a tuple, an item is evaluated for truth."""
    return value is not _HELD and not (type(value) is tuple and _HELD in value)


def _result(function: str, arguments: tuple[_Value, ...]) -> _Value:
    """Return the knowledge of a call's result."""
    if (boxes := _REBUILDING.get(function)) is not None:
        if all(
            _is_kept(each) if at in boxes else _is_constant(each) for at, each in enumerate(arguments) if at
        ):
            return _HELD
    elif function in _MAKE_BOXES:
        return _BOX
    elif function in _MAKE_CONSTANTS and _is_constant(arguments):
        return _CONSTANT
    elif function == _RECONSTRUCTOR and _is_constant(arguments) and arguments[1] == "builtins.object":
        return _BOX
    raise _NotPlainError(f"it calls {function} with what is not known")


def _is_type(name: str) -> bool:
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


_Op: TypeAlias = Callable[[_Reading], object]


def _odd(_: _Reading) -> None:
    raise _NotPlainError("it has an op that torch.save does not write")


def _ops(kinds: Iterable[tuple[str, Callable[..., object], Any]]) -> list[_Op]:
    ops: list[_Op] = [_odd] * 256
    for names, method, argument in kinds:
        for name in names.split():
            ops[ord(_OPCODES[name].code)] = method if argument is None else _given(method, argument)
    return ops


def _given(method: Callable[..., object], argument: Any) -> _Op:
    return lambda reading: method(reading, argument)


_OPS = _ops(
    [
        ("PROTO", _Reading.skip, 1),
        ("FRAME", _Reading.skip, 8),
        ("LONG1 SHORT_BINBYTES SHORT_BINSTRING", _Reading.sized, 1),
        ("LONG4 BINBYTES BINSTRING", _Reading.sized, 4),
        ("BINUNICODE8 BINBYTES8 BYTEARRAY8", _Reading.sized, 8),
        ("SHORT_BINUNICODE", _Reading.text, None),
        ("EMPTY_TUPLE", _Reading.push, ()),
        ("EMPTY_LIST EMPTY_DICT EMPTY_SET", _Reading.push, _BOX),
        ("MARK", _Reading.mark, None),
        ("POP", lambda reading: reading.stack.pop(), None),
        ("POP_MARK", _Reading.pop_mark, None),
        ("DUP", _Reading.duplicate, None),
        ("LONG_BINGET", _Reading.get, None),
        ("BINPUT", _Reading.put, None),
        ("MEMOIZE", _Reading.memoize, None),
        ("TUPLE", _Reading.tuple_from_mark, None),
        ("TUPLE1", _Reading.tuple_of, 1),
        ("TUPLE2", _Reading.tuple_of, 2),
        ("TUPLE3", _Reading.tuple_of, 3),
        ("FROZENSET", _Reading.set_from_mark, None),
        ("APPEND", _Reading.fill, 1),
        ("SETITEM", _Reading.fill, 2),
        ("APPENDS SETITEMS ADDITEMS", _Reading.fill_from_mark, None),
        ("GLOBAL", _Reading.name, None),
        ("STACK_GLOBAL", _Reading.name_from_stack, None),
        ("REDUCE NEWOBJ", _Reading.call, None),
        ("BUILD", _Reading.build, None),
        ("BINPERSID", _Reading.storage, None),
    ]
)
