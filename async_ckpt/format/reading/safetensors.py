"""Reads the safetensors format, as ``torch.load`` does for files of that name. Such a file cannot run code.

Guarantees: no memory is allocated for more bytes than the file has. The tensors are contiguous and fill the file after
the header, as the format demands; other files are refused.

What does not belong here: fetching (`file`), selecting tensors (`selection`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "LENGTH_BYTES",
    "SafeTensor",
    "device_of",
    "header_length",
    "is_named_so",
    "parse_header",
    "runs_of",
]

LENGTH_BYTES = 8  # the length of the header's length

_ENDING = ".safetensors"
_LONGEST_HEADER_BYTES = 100_000_000  # as the format has it
_METADATA = "__metadata__"
_MOST_ELEMENTS = 2**63 - 1

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeTensor:
    """A tensor in the file.

    Attributes:
        name: its key.
        dtype: its dtype.
        shape: its shape.
        start: the offset of its bytes in the file.
        nbytes: its size in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the tensor over *storage*."""
        return torch.empty(0, dtype=self.dtype).set_(storage).view(self.shape)


def is_named_so(url: str) -> bool:
    """Return whether torch.load takes a file of that name for safetensors; the query of a URL does not count."""
    return url.endswith(_ENDING) or url.partition("?")[0].endswith(_ENDING)


def header_length(data: bytes, nbytes: int) -> int:
    """Return the length of the header, given the first bytes of a file of *nbytes* bytes.

    Raises:
        ValueError: the file is not of this format.
    """
    _expect(len(data) == LENGTH_BYTES, "it is too short")
    (length,) = struct.unpack("<Q", data)
    _expect(
        0 < length <= min(nbytes - LENGTH_BYTES, _LONGEST_HEADER_BYTES), "its header has an impossible length"
    )
    return int(length)


def parse_header(header: bytes, nbytes: int) -> list[SafeTensor]:
    """Return the tensors of a file of *nbytes* bytes, in the order of the file.

    Raises:
        ValueError: the header is not valid, or does not match the file.
    """
    try:
        found = json.loads(header.decode())
    except RecursionError:
        raise ValueError("its header is nested") from None
    _expect(isinstance(found, dict), "its header is not a mapping")
    found.pop(_METADATA, None)
    first = LENGTH_BYTES + len(header)
    tensors = sorted(
        (_tensor(name, each, first) for name, each in found.items()),
        key=lambda each: (each.start, each.nbytes),
    )
    at = first
    for each in tensors:
        _expect(each.start == at, f"{each.name!r} does not begin where the previous tensor ends")
        at += each.nbytes
    _expect(at == nbytes, f"it has {nbytes} bytes instead of {at}")
    return tensors


def device_of(map_location: Any) -> str:
    """Return the device that *map_location* names.

    Raises:
        RuntimeError: it names no device; with torch.load's message.
    """
    if isinstance(map_location, dict) or callable(map_location):
        kind = "dict" if isinstance(map_location, dict) else "callable"
        raise RuntimeError(
            f"Loading safetensors file with {kind} map_location is not supported. "
            "Use a device string or torch.device instead."
        )
    return str(map_location) if isinstance(map_location, (str, torch.device)) else "cpu"


def runs_of(
    tensors: Iterable[SafeTensor], memory: Iterable[memoryview]
) -> list[tuple[int, list[memoryview]]]:
    """Return the offset and the *memory* of each run of adjacent *tensors*."""
    runs: list[tuple[int, list[memoryview]]] = []
    at = -1
    for each, place in zip(tensors, memory, strict=True):
        if each.start != at:
            runs.append((each.start, []))
        runs[-1][1].append(place)
        at = each.start + each.nbytes
    return runs


def _tensor(name: str, said: Any, first: int) -> SafeTensor:
    _expect(isinstance(said, dict), f"{name!r} is not described")
    dtype = getattr(torch, _NAMES.get(str(said.get("dtype")), ""), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} has a dtype that this torch does not support: {said.get('dtype')!r}")
    shape, offsets = (_numbers(said.get(key), name) for key in ("shape", "data_offsets"))
    _expect(len(offsets) == 2, f"{name!r} has no data_offsets")  # a start and a stop
    nbytes = offsets[1] - offsets[0]
    _expect(math.prod(shape) * dtype.itemsize == nbytes, f"{name!r} has a size that does not match its shape")
    return SafeTensor(name=name, dtype=dtype, shape=shape, start=first + offsets[0], nbytes=nbytes)


def _numbers(said: Any, name: str) -> tuple[int, ...]:
    known = isinstance(said, list) and all(type(each) is int and 0 <= each <= _MOST_ELEMENTS for each in said)
    _expect(known, f"{name!r} is not described by ints")
    return tuple(said)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
