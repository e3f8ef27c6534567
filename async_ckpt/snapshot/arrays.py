"""What numpy says of an array, without its bytes.

Guarantees: an array is only lifted where numpy was seen to say of one what is said here; all others are left to numpy
itself. numpy is not imported before somebody else has.
"""

from __future__ import annotations

import copyreg
import math
import sys
from functools import cache
from typing import Any

__all__ = ["ArrayBytes", "is_liftable", "reduction"]

_LARGEST_BYTES = 2 << 30  # beyond it, pickle may have no room for them, and is left to say so
_PROTOCOL = 2
_PLAIN_KINDS = frozenset("biufcmMSUV")  # of dtypes whose elements are bytes in the array and nothing else


def is_liftable(obj: Any) -> bool:
    """Return whether *obj* is an array whose bytes are to be lifted out of what it is pickled to."""
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
    """Stands for the bytes of an array, as it was when pickle came to it: another thread may give it another shape.

    Attributes:
        array: the array itself.
        shape: its shape then.
        dtype: its dtype then.
        nbytes: how many there were of them.
        is_fortran: whether the first index is the one that runs fastest in what is written.
    """

    __slots__ = ("array", "dtype", "is_fortran", "nbytes", "shape")

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype
        self.nbytes = math.prod(self.shape) * int(self.dtype.itemsize)
        self.is_fortran = bool(array.flags.fnc)

    def is_still(self, array: Any) -> bool:
        """Return whether *array*, the array itself or a view of all its bytes, is shaped as it was."""
        return (array.shape, array.dtype.itemsize, array.flags.fnc) == (
            self.shape,
            self.dtype.itemsize,
            self.is_fortran,
        )


def reduction(data: ArrayBytes) -> tuple[Any, ...]:
    """Return what numpy tells pickle of an array that is liftable, with *data* in place of its bytes."""
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
    """Return the function, the number and the code that this numpy names, if it says of arrays what is said here."""
    import numpy

    parts: Any = numpy.empty(0).__reduce_ex__(_PROTOCOL)
    # numpy's own code, not one that is equal: pickle tells them apart, and one read from a .pyc file is another.
    function, version, code = parts[0], parts[2][0], parts[1][2]
    whole = numpy.arange(6.0).reshape(2, 3)
    pairs = numpy.array([(1, 2.5)], dtype=[("a", "i1"), ("b", "f8")])
    is_known = all(
        array.__reduce_ex__(_PROTOCOL)
        == _reduction(ArrayBytes(array), array.tobytes("A"), function, version, code)
        for array in (whole, whole.T, whole[:, ::2], whole[0], whole[0, 0:1].reshape(()), pairs)
    )
    return (function, version, code) if is_known else None
