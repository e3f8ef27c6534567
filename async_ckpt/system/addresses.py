"""The addresses of bytes that may not be written to, and copies from them that do without the GIL.

Guarantees: bytes are only read.
"""

from __future__ import annotations

import ctypes

__all__ = ["address_of", "copy_bytes"]

_SMALL_BYTES = 16 << 10  # such a copy takes less than what it takes to let the GIL go


class _Buffer(ctypes.Structure):
    """``Py_buffer``, part of Python's stable ABI."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(piece: memoryview | bytes | bytearray) -> int:
    """Return the address of contiguous bytes; ctypes itself returns it only for writable ones."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(piece), ctypes.byref(buffer), 0)
    address = buffer.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return int(address)


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy *source* into *target*, contiguous bytes of the same length; without the GIL unless they are few."""
    if source.nbytes != target.nbytes:
        raise ValueError(f"no copy of {source.nbytes} bytes into {target.nbytes}")
    if source.nbytes <= _SMALL_BYTES:
        target[:] = source
    else:
        ctypes.memmove(address_of(target), address_of(source), source.nbytes)
