"""Reads ``.metadata``, the pickle in which DCP describes a sharded checkpoint; it makes a directory a checkpoint.

Guarantees: nothing that the pickle names is imported, called or changed. It is read into records of our own first. If
anything differs from the form that DCP writes, it is refused by name; only then torch's own classes are made. Memory is
bounded by the length of the file. No path in it leads out of the directory.

Only this module and `items` know DCP's format. What does not belong here: the other files of a checkpoint.
"""

from __future__ import annotations

import errno
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any, NoReturn

import anyio
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from async_ckpt.errors import CorruptCheckpointError, IncompleteCheckpointError, StoreError
from async_ckpt.sharded.memo import check_memo
from async_ckpt.stores.base import MARKER, Location, Store, Workers
from async_ckpt.system.garbage import collector_held_back

__all__ = ["fetch_manifest", "known_to", "parse_manifest", "read_manifest", "save_id_of", "write_manifest"]

_LONGEST_BYTES = 4 << 30  # parsing takes ten times its length in memory
_PROTOCOL = 4  # known to every Python that torch runs on
_MEMORY_FORMATS = {0: torch.contiguous_format, 1: torch.channels_last, 2: torch.preserve_format}
_MOST_DIMENSIONS = 64  # of a tensor of torch's


@collector_held_back()
def write_manifest(metadata: Metadata) -> bytes:
    """Return *metadata* as a ``.metadata`` file, which torch's own reader reads, too."""
    return pickle.dumps(metadata, protocol=_PROTOCOL)


def save_id_of(metadata: Metadata) -> str | None:
    """Return the id of the save that wrote it, if it has one."""
    meta = getattr(metadata, "storage_meta", None)
    return None if meta is None else meta.save_id


async def read_manifest(store: Store, location: Location, workers: Workers | None = None) -> Metadata:
    """Return the parsed ``.metadata`` of a directory.

    Args:
        store: serves the directory.
        location: the directory.
        workers: parse it, which takes a second for fifty thousand chunks; None parses it on this thread.

    Raises:
        IncompleteCheckpointError: there is none.
        CorruptCheckpointError: it is damaged, or DCP has not written it.
        StoreError: it cannot be read.
    """
    data = await fetch_manifest(store, location)
    if workers is None:
        return parse_manifest(data, location.url)
    return await workers.run(parse_manifest, data, location.url)


async def fetch_manifest(store: Store, location: Location) -> bytes:
    """Return the bytes of the ``.metadata`` of a directory; see ``read_manifest``."""
    try:
        source = await store.source(location.below(MARKER))
    except FileNotFoundError as error:
        raise IncompleteCheckpointError.at(location.url) from error
    except StoreError as error:
        if error.errno != errno.ENOTDIR:
            raise
        raise IncompleteCheckpointError.at(location.url) from error
    try:
        if source.nbytes > _LONGEST_BYTES:
            raise _corrupt(location.url, f"it is {source.nbytes} bytes long")
        data = bytearray(source.nbytes)
        await source.read_into(0, memoryview(data))
    finally:
        with anyio.CancelScope(shield=True):
            await source.aclose()
    return bytes(data)


@collector_held_back()
def parse_manifest(data: bytes, url: str) -> Metadata:
    """Parse a ``.metadata``; blocks.

    Args:
        data: the bytes of the file.
        url: the checkpoint's, for messages.

    Raises:
        CorruptCheckpointError: it is damaged, or DCP has not written it; the message names what is wrong.
    """
    try:
        check_memo(data)
        return _metadata(_Unpickler(data).load())
    except _FormError as error:
        raise _corrupt(url, str(error)) from error
    except Exception as error:  # a damaged pickle may raise any
        raise _corrupt(url, f"{type(error).__name__}: {error}") from error


def _corrupt(url: str, reason: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"the .metadata of {url!r} is damaged, or is not what torch.distributed.checkpoint writes: {reason}",
        location=url,
        stage="read",
    )


class _FormError(ValueError):
    """Something has another form than DCP writes."""


def _refuse(what: str) -> NoReturn:
    raise _FormError(what)


# -- the pickle


class _Record:
    """An object of the pickle, with the state that the pickle gives it."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        self.state = state


_SHARDING = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.0 has them
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    _SHARDING: {"TensorProperties"},
}
_CALLS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: (
        torch.strided if name == "torch.strided" else _refuse(name)
    ),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): lambda value: _MEMORY_FORMATS[value],
    (_SHARDING, "MEM_FORMAT_ENCODING"): lambda value: _MEMORY_FORMATS[value],
    ("collections", "OrderedDict"): dict,
}
_PATHS = frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"})


class _Unpickler(pickle.Unpickler):
    """Accepts the names that DCP writes, and no others."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # Classes for this pickle only, as it could change them.
        self._kinds: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that is used for a name."""
        if name in _RECORDS.get(module, ()):
            if (kind := self._kinds.get((module, name))) is None:
                kind = self._kinds[module, name] = type(name, (_Record,), {"__slots__": ()})
            return kind
        if (call := _CALLS.get((module, name))) is not None:
            return call if isinstance(call, type) else lambda *arguments: call(*arguments)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.partition(".")[0] == "pathlib" and name in _PATHS:  # a checkpoint_id
            return lambda *parts: str(PurePosixPath(*parts))
        _refuse(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to anything outside of the pickle."""
        _refuse("it refers to an object outside of the pickle")


# -- from records to torch's classes


def _metadata(found: Any) -> Metadata:
    state = _state_of(found, "Metadata")
    storage_meta = state.get("storage_meta")
    made = {
        "state_dict_metadata": {
            _text(name): _item(each) for name, each in _pairs(state.get("state_dict_metadata"))
        },
        "planner_data": _planner_data(state.get("planner_data")),
        "storage_data": {
            _index(index): _storage_info(each) for index, each in _pairs(state.get("storage_data"))
        },
        "storage_meta": None if storage_meta is None else _storage_meta(storage_meta),
        "version": _optional_text(state.get("version")),
    }
    return Metadata(**known_to(Metadata, made))


def known_to(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Drop the fields that the dataclass *kind* of torch does not have in this release."""
    known = {each.name for each in fields(kind)}
    return {name: value for name, value in values.items() if name in known}


def _state_of(found: Any, kind: str) -> dict[str, Any]:
    if type(found).__name__ != kind or not isinstance(found, _Record):
        _refuse(f"it has a {type(found).__name__} instead of a {kind}")
    state = getattr(found, "state", {})
    return state if isinstance(state, dict) else _refuse(f"a {kind} has another form")


def _pairs(found: Any) -> Iterable[tuple[Any, Any]]:
    return (
        found.items()
        if isinstance(found, dict)
        else _refuse(f"it has a {type(found).__name__} instead of a dict")
    )


def _text(found: Any) -> str:
    return found if type(found) is str else _refuse(f"it has a {type(found).__name__} instead of a name")


def _optional_text(found: Any) -> str | None:
    return None if found is None else _text(found)


def _count(found: Any) -> int:
    return (
        found
        if type(found) is int and found >= 0
        else _refuse(f"it has {found!r} instead of a non-negative int")
    )


def _size(found: Any) -> torch.Size:
    if type(found) is not torch.Size or len(found) > _MOST_DIMENSIONS or any(each < 0 for each in found):
        _refuse("it has a size that is not valid")
    return found


def _item(found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(found).__name__ == "BytesStorageMetadata":
        _state_of(found, "BytesStorageMetadata")
        return BytesStorageMetadata()
    state = _state_of(found, "TensorStorageMetadata")
    size, chunks = _size(state.get("size")), state.get("chunks")
    if type(chunks) is not list:
        _refuse("a tensor has no list of chunks")
    return TensorStorageMetadata(
        properties=_properties(state.get("properties")),
        size=size,
        chunks=[_chunk(each, size) for each in chunks],
    )


def _chunk(found: Any, size: torch.Size) -> ChunkStorageMetadata:
    state = _state_of(found, "ChunkStorageMetadata")
    offsets, sizes = _size(state.get("offsets")), _size(state.get("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(
        first + length > whole for first, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        _refuse("a chunk is not within its tensor")
    return ChunkStorageMetadata(offsets=offsets, sizes=sizes)


def _properties(found: Any) -> TensorProperties:
    if type(found).__name__ != "TensorProperties" or not isinstance(found, _Record):
        _refuse("a tensor has no properties")
    dtype, layout, requires_grad, memory_format, pin_memory = found.state
    if not isinstance(dtype, torch.dtype):
        _refuse("a tensor has no dtype")
    return TensorProperties(
        dtype=dtype,
        layout=layout if isinstance(layout, torch.layout) else _refuse("a tensor has no layout"),
        requires_grad=bool(requires_grad),
        memory_format=memory_format
        if isinstance(memory_format, torch.memory_format)
        else _refuse("a tensor has no memory format"),
        pin_memory=bool(pin_memory),
    )


def _index(found: Any) -> MetadataIndex:
    state = _state_of(found, "MetadataIndex")
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _text(state.get("fqn")),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _storage_info(found: Any) -> _StorageInfo:
    state = _state_of(found, "_StorageInfo")
    path, transforms = _text(state.get("relative_path")), state.get("transform_descriptors")
    if path.startswith("/") or "\0" in path or "\\" in path or ".." in path.split("/"):
        _refuse(f"the path {path!r} leads out of the directory")
    info = _StorageInfo(path, _count(state.get("offset")), _count(state.get("length")))
    if transforms is not None:
        # Set afterwards, because torch before 2.7 has no such field, and our reader must see it.
        info.transform_descriptors = [_text(each) for each in transforms]
    return info


def _storage_meta(found: Any) -> StorageMeta:
    state = _state_of(found, "StorageMeta")
    modules = state.get("modules") or []
    made = {name: _optional_text(state.get(name)) for name in ("checkpoint_id", "save_id", "load_id")} | {
        "modules": [_text(each) for each in modules]
    }
    return StorageMeta(**known_to(StorageMeta, made))


def _planner_data(found: Any) -> dict[str, tuple[str | int, ...]] | None:
    if found is None:
        return None
    return {_text(name): tuple(_step(each) for each in _path(path)) for name, path in _pairs(found)}


def _path(found: Any) -> tuple[Any, ...] | list[Any]:
    return found if isinstance(found, (tuple, list)) else _refuse("the path to a value is not valid")


def _step(found: Any) -> str | int:
    return found if type(found) is str or type(found) is int else _refuse("the path to a value is not valid")
