"""Tells whether two skeletons differ in values alone, such as numbers, and where these are in the filled pickle.

Guarantees: two skeletons of which that is so have the same opcodes, lengths and memo numbers, so whatever fills the one
fills the other, and the filled pickles differ in just these bytes. If in doubt, it is not so.

What does not belong here: whether the holes have the same content.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from async_ckpt.snapshot.filling import Runs

__all__ = ["find_patches"]

_BLOCK = 256
_MOST_BYTES = 4096  # where more differ, or are further apart, filling the other skeleton is as fast
_MOST_OPCODES = 20_000
_BOOLS = b"\x88\x89"
# The next opcode, of those that `filling` knows, with its number; or a group with the length of what follows it.
_OPCODE = (
    rb"(?s)X(.{4})|\x8a(.)|\x8b(.{4})|[()\].01NRabetsu}\x81\x85-\x89]|c[^\n]*\n[^\n]*\n"
    rb"|[Kqh\x80\x82].|[M\x83]..|[Jrj\x84].{4}|G.{8}"
)


def find_patches(old: bytes, new: bytes, runs: Runs) -> list[tuple[int, int]] | None:
    """Return the bytes in which the filled pickle differs, as places and values; ``None`` if more than a few values do.

    Args:
        old: a skeleton.
        new: another one; the content of its holes is the same.
        runs: what became of the old one.
    """
    if len(old) != len(new):
        return None
    patches: list[tuple[int, int]] = []
    run, value = -1, _NO_VALUE
    values: Iterator[_Value] = iter(())
    for at in _differences(old, new):
        if len(patches) == _MOST_BYTES:
            return None
        of_byte = bisect_right(runs.begins, at) - 1
        if of_byte != run:
            run, value = of_byte, _NO_VALUE
            values = _values(old, runs.begins[run], runs.ends[run])
        while value.stop <= at:
            value = next(values, _Value(len(old), len(old) + 1))  # no more: it is no value, or too far
        if at < value.start or (value.is_bool and new[at] not in _BOOLS):
            return None
        patches.append((runs.places[run] + at - runs.begins[run], new[at]))
    return patches


class _Value(NamedTuple):
    """The bytes of a pickle that may differ."""

    start: int
    stop: int
    is_bool: bool = False


_NO_VALUE = _Value(0, 0)


def _values(pickle: bytes, at: int, end: int) -> Iterator[_Value]:
    """Yield the values from the opcode at *at* on."""
    match = re.compile(_OPCODE).match
    for _ in range(_MOST_OPCODES):
        if at == end:
            return
        found = match(pickle, at)
        assert found is not None, "filling has read it"
        opcode, stop = pickle[at], found.end()
        if found.lastindex:
            length = int.from_bytes(found[found.lastindex], "little")
            yield _Value(stop, stop + length)
            stop += length
        elif opcode in b"KMJG":
            yield _Value(at + 1, stop)
        elif opcode in _BOOLS:
            yield _Value(at, stop, is_bool=True)
        at = stop


def _differences(old: bytes, new: bytes) -> Iterator[int]:
    """Yield where two pickles of one length differ."""
    for start in range(0, len(old), _BLOCK):
        one, other = old[start : start + _BLOCK], new[start : start + _BLOCK]
        if one != other:
            yield from (start + at for at in range(len(one)) if one[at] != other[at])
