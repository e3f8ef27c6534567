"""Bounds the memory that Python's unpickler allocates for a pickle's memo. Pure.

Guarantees: after `check_memo`, the memo takes at most a few pointers for each byte of the pickle.

What does not belong here: which classes a pickle names (`manifest`, `items`).
"""

from __future__ import annotations

import pickletools
from typing import NoReturn

__all__ = ["check_memo"]

_MEMO_OPS = {"BINPUT": 1, "LONG_BINPUT": 4}
_FIXED = [0] * 256  # by opcode: its length with its argument, if that is fixed
_PREFIXED = [0] * 256  # by opcode: the length of the number that gives the argument's length
for _op in pickletools.opcodes:
    if _op.name not in _MEMO_OPS:
        length = 0 if _op.arg is None else _op.arg.n
        if length >= 0:
            _FIXED[ord(_op.code)] = 1 + length
        elif length <= pickletools.TAKEN_FROM_ARGUMENT1:
            _PREFIXED[ord(_op.code)] = {-2: 1, -3: 4, -4: 4, -5: 8}[length]
_STOP, _BINPUT, _LONG_BINPUT, _GLOBAL = b".qrc"


def check_memo(data: bytes) -> None:
    """Refuse a pickle with high memo numbers: Python's unpickler allocates room for all numbers below them."""
    at, fixed, prefixed = 0, _FIXED, _PREFIXED
    while (op := data[at]) != _STOP:
        if length := fixed[op]:
            at += length
        elif width := prefixed[op]:
            at += 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little")
        elif op in (_BINPUT, _LONG_BINPUT):
            width = 1 if op == _BINPUT else 4
            if int.from_bytes(data[at + 1 : at + 1 + width], "little") > at:
                _refuse("it has a memo number that is too high")
            at += 1 + width
        elif op == _GLOBAL:
            at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
        else:
            _refuse("it has an opcode that torch does not write")


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)
