"""One item of a sharded checkpoint: an archive of ``torch.save`` with one tensor, as DCP puts them into its files.

Guarantees: no code in an archive is run. The place of the tensor's bytes is taken from the archive's own headers, and
that they are this tensor, row after row, from its pickle. Anything else is `Unusual`, and left to ``torch.load``. Pure,
except for `load_tensor` and `load_value`.

What does not belong here: which part of an item is wanted (`extents`), fetching it (`fetching`).
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.format.central_directory import (
    LOCAL_HEADER,
    NOT_UNDERSTOOD,
    Entry,
    data_start,
    find_directory,
    list_entries,
)
from async_ckpt.format.checksum import crc32
from async_ckpt.sharded.memo import check_memo

__all__ = [
    "LONGEST_HEAD_BYTES",
    "Damaged",
    "Unusual",
    "check_archive",
    "checksum_in",
    "corrupt_item",
    "load_tensor",
    "load_value",
    "where_is_data",
]

LONGEST_HEAD_BYTES = 4096
"""More than the header before a tensor's bytes ever takes."""

_MAGIC = b"PK\x03\x04"
_MOST_KNOWN = 1024

_known: dict[tuple[torch.dtype, tuple[int, ...]], tuple[bytes, int]] = {}
"""By dtype and sizes, the header of the last such tensor, and where its bytes begin."""


class Unusual(Exception):
    """It is not a tensor that torch wrote row after row, but it may be valid."""


class Damaged(Exception):
    """It differs from what was written."""


def corrupt_item(url: str, name: str, reason: str) -> CorruptCheckpointError:
    """Return the error for the item *name* of the checkpoint at *url*."""
    return CorruptCheckpointError(
        f"{url!r} is corrupt: its item {name!r} is damaged: {reason}. Load an earlier checkpoint.",
        location=url,
        stage="read",
    )


def where_is_data(head: bytes, dtype: torch.dtype, sizes: Sequence[int]) -> int:
    """Return where in an item the bytes of its tensor begin.

    Args:
        head: the beginning of the item, at least up to these bytes.
        dtype: the dtype that the tensor should have.
        sizes: the sizes that it should have.

    Raises:
        Unusual: *head* does not say so.
    """
    kind = dtype, tuple(sizes)
    known = _known.get(kind)
    if known is not None and head.startswith(known[0]):  # most layers of a model are alike
        return known[1]
    found = _find_data(head, dtype, sizes)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[kind] = head[:found], found
    return found


def _find_data(head: bytes, dtype: torch.dtype, sizes: Sequence[int]) -> int:
    try:
        header, pickled = 0, data_start(0, head[: LOCAL_HEADER.size])
        if not _name(head, 0).endswith(b"/data.pkl"):
            raise Unusual("its first record is not a pickle")
        stream = io.BytesIO(head)
        stream.seek(pickled)
        check_memo(head[pickled:])
        tensor = _Unpickler(stream).load()
        _check(tensor, dtype, sizes)
        at = stream.tell()
        while (header := head.find(_MAGIC, at)) >= 0:
            start, name = data_start(header, head[header : header + LOCAL_HEADER.size]), _name(head, header)
            if name.endswith(b"/byteorder") and not head.startswith(sys.byteorder.encode(), start):
                raise Unusual("its bytes are in another byte order")
            if name.endswith(b"/data/0"):
                return start + int(tensor.offset) * dtype.itemsize
            at = start
    except Unusual:
        raise
    except Exception as error:  # it is not an archive, or not a pickle
        raise Unusual(f"{type(error).__name__}: {error}") from error
    raise Unusual("it has no record of a storage")


def checksum_in(tail: bytes, nbytes: int, data_nbytes: int) -> int | None:
    """Return the CRC-32 that an item holds for the bytes of its tensor; None if it holds none.

    Args:
        tail: the rest of the item after these bytes.
        nbytes: the length of the item.
        data_nbytes: the number of these bytes.

    Raises:
        Unusual: its storage has another length.
        Damaged: it does not end as an archive does.
    """
    try:
        start, stop = find_directory(tail, nbytes)
        first = nbytes - len(tail)
        entries = list(list_entries(tail[start - first : stop - first]))
    except NOT_UNDERSTOOD as error:
        raise Damaged(f"its end is damaged ({error})") from error
    found = [entry for entry in entries if entry.name.endswith("/data/0")]
    if len(found) != 1 or found[0].method or found[0].nbytes != data_nbytes:
        raise Unusual("its storage holds more than the tensor")
    return found[0].checksum or None  # torch writes 0 if its user has switched checksums off


def check_archive(data: bytes | memoryview) -> None:
    """Verify the checksums in a whole archive; data that is not an archive is accepted.

    Raises:
        Damaged: a checksum is wrong.
    """
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        return
    try:
        start, stop = find_directory(data, len(data))
        entries = list(list_entries(data[start:stop]))
        for entry in entries:
            _compare(data, entry)
    except NOT_UNDERSTOOD as error:
        raise Damaged(f"its archive is damaged ({error})") from error


def _compare(data: bytes | memoryview, entry: Entry) -> None:
    begin = data_start(entry.header, data[entry.header : entry.header + LOCAL_HEADER.size])
    if begin + entry.packed_nbytes > len(data):
        raise Damaged(f"its record {entry.name!r} is truncated")
    if not entry.method and entry.checksum not in (crc32(data[begin : begin + entry.nbytes], 0), 0):
        raise Damaged(f"the checksum of its record {entry.name!r} is wrong")


def load_tensor(data: bytes | memoryview) -> torch.Tensor:
    """Return the tensor of a whole item, loaded by ``torch.load`` with ``weights_only=True``.

    Raises:
        Damaged: it cannot be loaded.
    """
    check_archive(data)
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise Damaged(str(error)) from error
    if not isinstance(tensor, torch.Tensor):
        raise Damaged("it is not a tensor")
    return tensor


def load_value(data: bytes | memoryview) -> Any:
    """Return the value of a whole item that is not a tensor, loaded with ``weights_only=True``.

    Raises:
        pickle.UnpicklingError: it needs more than that allows.
        Damaged: it cannot be loaded.
    """
    check_archive(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise Damaged(str(error)) from error


# -- the pickle of one tensor


@dataclass(frozen=True, slots=True)
class _Tensor:
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


def _rebuild(storage: Any, offset: Any, sizes: Any, strides: Any, *others: Any) -> _Tensor:
    # The rest: requires_grad, hooks, in the newer form the dtype, and finally any special properties of the tensor.
    dtype, count = storage
    marks = others[2:]
    if marks and isinstance(marks[0], torch.dtype):
        dtype, marks = marks[0], marks[1:]
    if any(marks) or not isinstance(dtype, torch.dtype):
        raise Unusual("it is not a plain tensor")
    return _Tensor(offset, tuple(sizes), tuple(strides), dtype, count)


_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    """Accepts the names that ``torch.save`` writes for one tensor."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that is used for a name."""
        if (call := _CALLS.get((module, name))) is not None:
            return call
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.uint8  # its length is in bytes
        found = getattr(torch, name.removesuffix("Storage"), None) if module == "torch" else None
        if isinstance(found, torch.dtype):  # of a dtype without a storage class
            return found
        if module == "torch" and (dtype := _TYPED.get(name)) is not None:
            return dtype
        raise Unusual(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        """Return the dtype and the length of the storage."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or key != "0" or not isinstance(dtype, torch.dtype):
            raise Unusual("it refers to another storage")
        return dtype, count * dtype.itemsize


_TYPED = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


def _check(tensor: Any, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """Raise Unusual unless it is a tensor of that kind, row after row."""
    if not isinstance(tensor, _Tensor) or tensor.dtype != dtype or tensor.sizes != tuple(sizes):
        raise Unusual("it is not the tensor that .metadata describes")
    expected = 1
    for size, stride in zip(reversed(tensor.sizes), reversed(tensor.strides), strict=True):
        if size > 1 and stride != expected:
            raise Unusual("its rows are not contiguous")
        expected *= size
    if tensor.offset < 0 or (tensor.offset + expected) * dtype.itemsize > tensor.nbytes:
        raise Unusual("it is larger than its storage")


def _name(head: bytes, header: int) -> bytes:
    start = header + LOCAL_HEADER.size
    return bytes(head[start : start + int.from_bytes(head[header + 26 : header + 28], "little")])
