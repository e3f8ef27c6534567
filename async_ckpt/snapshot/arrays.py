"""Pickling numpy arrays without their bytes.

Guarantees: an array is only extracted if this numpy was seen to reduce arrays as this module does; all others are left
to numpy itself. numpy is not imported unless the program has imported it.
"""

from __future__ import annotations

import copyreg
import math
import sys
from functools import cache
from typing import Any

__all__ = ["ArrayBytes", "is_extractable", "reduction"]

_LARGEST_BYTES = 2 << 30  # beyond it, pickle may have no room for them, and is left to say so
_PROTOCOL = 2
_PLAIN_KINDS = frozenset("biufcmMSUV")  # of dtypes whose elements are bytes in the array and nothing else


def is_extractable(obj: Any) -> bool:
    """Return whether *obj* is an array whose bytes are to be extracted from its pickle."""
    numpy: Any = sys.modules.get("numpy")
    return (
        numpy is not None
        and type(obj) is getattr(numpy, "ndarray", None)
        and 1
        < obj.nbytes
        < _LARGEST_BYTES  # of shorter bytes Python has one object, and pickle asks which it is
        and obj.dtype.kind in _PLAIN_KINDS
        and not obj.dtype.hasobject
        and numpy.ndarray not in copyreg.dispatch_table
        and _said() is not None
    )


class ArrayBytes:
    """Stands for the bytes of an array as it was when pickle reached it: another thread may reshape it.

    Attributes:
        array: the array itself.
        shape: its shape at that time.
        dtype: its dtype at that time.
        nbytes: its size in bytes at that time.
        is_fortran: whether the bytes are written in Fortran order.
    """

    __slots__ = ("array", "dtype", "is_fortran", "nbytes", "shape")

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype
        self.nbytes = math.prod(self.shape) * int(self.dtype.itemsize)
        self.is_fortran = bool(array.flags.fnc)

    def is_still(self, array: Any) -> bool:
        """Return whether *array*, the array itself or a view of all its bytes, has the shape it had."""
        return (array.shape, array.dtype.itemsize, array.flags.fnc) == (
            self.shape,
            self.dtype.itemsize,
            self.is_fortran,
        )


def reduction(data: ArrayBytes) -> tuple[Any, ...]:
    """Return numpy's reduction of an extractable array, with *data* in place of its bytes."""
    said = _said()
    assert said is not None
    return _reduction(data, data, *said)


def _reduction(seen: ArrayBytes, data: Any, function: Any, version: int, code: bytes) -> tuple[Any, ...]:
    nothing = (*seen.shape[:0], 0)  # new each time, as numpy's is: pickle tells them apart
    return (
        function,
        (type(seen.array), nothing, code),
        (version, seen.shape, seen.dtype, seen.is_fortran, data),
    )


@cache
def _said() -> tuple[Any, int, bytes] | None:
    """Return the function, version and code of this numpy's reductions, if it reduces as this module does."""
    import numpy

    parts: Any = numpy.empty(0).__reduce_ex__(_PROTOCOL)
    # numpy's own object, not an equal one: pickle's memo goes by identity, and a .pyc file gives another object.
    function, version, code = parts[0], parts[2][0], parts[1][2]
    whole = numpy.arange(6.0).reshape(2, 3)
    pairs = numpy.array([(1, 2.5)], dtype=[("a", "i1"), ("b", "f8")])
    is_known = all(
        array.__reduce_ex__(_PROTOCOL)
        == _reduction(ArrayBytes(array), array.tobytes("A"), function, version, code)
        for array in (whole, whole.T, whole[:, ::2], whole[0], whole[0, 0:1].reshape(()), pairs)
    )
    return (function, version, code) if is_known else None
