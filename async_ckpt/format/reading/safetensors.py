"""A file of the safetensors format, as ``torch.load`` reads one that is named so. Nothing in it can run code.

Guarantees: no memory is taken that the file is not long enough for. The tensors lie side by side and fill what follows
the header, as the format has it; a file in which they do not is refused.

What does not belong here: fetching (`file`), which tensors are wanted (`selection`).
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

LENGTH_BYTES = 8  # of what says how long the header is

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
        dtype: of its numbers.
        shape: of itself.
        start: where its bytes begin in the file.
        nbytes: how many there are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the tensor whose numbers are in *storage*."""
        return torch.empty(0, dtype=self.dtype).set_(storage).view(self.shape)


def is_named_so(url: str) -> bool:
    """Return whether torch.load takes a file of that name for safetensors; what a URL asks for does not count."""
    return url.endswith(_ENDING) or url.partition("?")[0].endswith(_ENDING)


def header_length(data: bytes, nbytes: int) -> int:
    """Return how long the header is, given the first bytes of a file that is *nbytes* long.

    Raises:
        ValueError: no file of this format begins so.
    """
    _expect(len(data) == LENGTH_BYTES, "it is too short")
    (length,) = struct.unpack("<Q", data)
    _expect(0 < length <= min(nbytes - LENGTH_BYTES, _LONGEST_HEADER_BYTES), "its header has no such length")
    return int(length)


def parse_header(header: bytes, nbytes: int) -> list[SafeTensor]:
    """Return the tensors of a file that is *nbytes* long, in the order in which they lie there.

    Raises:
        ValueError: it is no such header, or not that of such a file.
    """
    try:
        found = json.loads(header.decode())
    except RecursionError:
        raise ValueError("its header is nested") from None
    _expect(isinstance(found, dict), "its header is no mapping")
    found.pop(_METADATA, None)
    first = LENGTH_BYTES + len(header)
    tensors = sorted(
        (_tensor(name, each, first) for name, each in found.items()),
        key=lambda each: (each.start, each.nbytes),
    )
    at = first
    for each in tensors:
        _expect(each.start == at, f"{each.name!r} does not follow what is before it")
        at += each.nbytes
    _expect(at == nbytes, f"it has {nbytes} bytes instead of {at}")
    return tensors


def device_of(map_location: Any) -> str:
    """Return the device that *map_location* names.

    Raises:
        RuntimeError: it names none; in the words of torch.load.
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
    """Return where each run of *tensors* that follow each other begins, and the *memory* of what it is made of."""
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
        raise ValueError(f"{name!r} has numbers of a kind that this torch has not: {said.get('dtype')!r}")
    shape, offsets = (_numbers(said.get(key), name) for key in ("shape", "data_offsets"))
    _expect(len(offsets) == 2, f"{name!r} does not say where it is")  # a start and a stop
    nbytes = offsets[1] - offsets[0]
    _expect(math.prod(shape) * dtype.itemsize == nbytes, f"{name!r} has not as many bytes as its shape has")
    return SafeTensor(name=name, dtype=dtype, shape=shape, start=first + offsets[0], nbytes=nbytes)


def _numbers(said: Any, name: str) -> tuple[int, ...]:
    known = isinstance(said, list) and all(type(each) is int and 0 <= each <= _MOST_ELEMENTS for each in said)
    _expect(known, f"{name!r} is not described by numbers")
    return tuple(said)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
