"""Writes the objects of a sharded checkpoint one by one, for programs in which torch's DCP decides who writes what.

Guarantees: the name of an object is unique to its save, and ``.metadata`` is written last (D5), as far as torch's
protocol allows. Tensors are not copied: their bytes are read when they are sent, those on a device piece by piece.

What does not belong here: torch's protocol (`dcp`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from async_ckpt.engine.writers import Emit, StreamingWriter
from async_ckpt.errors import UnpicklableStateError
from async_ckpt.events import Event
from async_ckpt.sharded.manifest import write_manifest
from async_ckpt.sharded.writing.archive import template
from async_ckpt.sharded.writing.generations import delete_replaced, find_replaced
from async_ckpt.sharded.writing.shard import Item, Shard, TensorItem
from async_ckpt.snapshot import Capture, Snapshot
from async_ckpt.snapshot.regions import Region, as_dense, capture_regions
from async_ckpt.snapshot.sources import bytes_of
from async_ckpt.stores.base import MARKER, Location, Store, Workers

__all__ = ["ManifestWriter", "ObjectWriter", "Value", "make_object"]

Value = bytes | Callable[[], torch.Tensor]
"""One item: a value as a file of ``torch.save``, or a function that returns the same tensor each time."""


def make_object(values: Sequence[tuple[str, Value]]) -> tuple[Shard, list[int]]:
    """Return an object with the given pairs of names and values, and the length of each value in it.

    Raises:
        UnpicklableStateError: the format of sharded checkpoints does not support a tensor.
    """
    items: list[Item] = []
    sources: list[Callable[[], torch.Tensor]] = []
    for name, value in values:
        if isinstance(value, bytes):
            items.append(value)
            continue
        tensor = _dense(name, value())
        file_template = template(tensor.dtype, tensor.shape, tensor.stride())
        items.append(TensorItem(file_template, Region(len(sources), 0, tensor.nbytes)))
        sources.append(lambda name=name, value=value: _dense(name, value()))  # type: ignore[misc]
    lengths = [len(item) if isinstance(item, bytes) else item.nbytes for item in items]
    return Shard(items, _Tensors(sources)), lengths


class ObjectWriter:
    """Writes one object; satisfies ``engine.writers.Writer``."""

    group = None
    only_reads = False  # it writes the program's own tensors, not a snapshot

    def __init__(self, streaming: StreamingWriter, content: Shard) -> None:
        self._streaming = streaming
        self._content = content

    def capture(self, state: Any, *, share_unpicklable: bool) -> Capture:
        """Copy nothing: the caller does not change the tensors."""
        return capture_regions([], overhead=0)[0]

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Write the object."""
        await self._streaming.stream(self._content, location, emit)
        return self._content.nbytes

    async def delete(self, location: Location) -> None:
        """Delete the object."""
        await self._streaming.delete(location)


class ManifestWriter(ObjectWriter):
    """Writes ``.metadata``, which completes a checkpoint, and then deletes the objects that it has replaced.

    Args:
        streaming: writes objects.
        metadata: that of the checkpoint.
        store: serves the directory.
        workers: threads for blocking calls.
        run: the name of this process's run.
        number: of the save.
    """

    def __init__(
        self,
        streaming: StreamingWriter,
        metadata: Metadata,
        *,
        store: Store,
        workers: Workers,
        run: str,
        number: int,
    ) -> None:
        super().__init__(streaming, Shard([write_manifest(metadata)]))
        self._kept = {stored.relative_path for stored in (metadata.storage_data or {}).values()}
        self._store = store
        self._workers = workers
        self._run = run
        self._number = number

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Write the ``.metadata`` of the directory *location*."""
        replaced = await find_replaced(self._store, location, self._workers)
        await self._streaming.stream(self._content, location.below(MARKER), _ignore)
        await delete_replaced(
            self._store, location, replaced, run=self._run, number=self._number, kept=self._kept
        )
        return self._content.nbytes


class _Tensors:
    """Tensors that are asked for when their bytes are read; satisfies ``shard.Memory``."""

    def __init__(self, sources: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._sources = sources

    def view(self, index: int) -> _TensorBytes:
        return _TensorBytes(self._sources[index]())


class _TensorBytes:
    """The bytes of a dense tensor, fetched when they are read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, which: slice, /) -> memoryview:
        tensor = self._tensor
        start = int(tensor.storage_offset()) * tensor.itemsize
        found = bytes_of(tensor.untyped_storage())[start : start + tensor.nbytes][which].cpu()
        if found.nbytes == 0:
            return memoryview(b"")
        memory = (ctypes.c_ubyte * found.nbytes).from_address(found.data_ptr())
        memory.owner = found  # type: ignore[attr-defined]  # keeps it alive as long as its bytes are in use
        return memoryview(memory).cast("B")


def _dense(name: str, tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach()
    if (
        type(plain) is not torch.Tensor
        or plain.layout is not torch.strided
        or plain.is_quantized
        or plain.is_meta
    ):
        raise UnpicklableStateError(
            f"cannot save {name}: the format of sharded checkpoints does not support a {type(plain).__name__} of "
            f"layout {plain.layout} on {plain.device}; save its components, each as a dense tensor",
            where=name,
        )
    return as_dense(plain)


def _ignore(event: type[Event], **values: Any) -> None:
    """Ignore events: only the objects of the ranks are reported."""
