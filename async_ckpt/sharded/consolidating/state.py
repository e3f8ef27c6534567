"""Lays out the file: the state of a sharded checkpoint, nested as it was saved, over tensors without memory.

Guarantees: the state is nested as torch's own ``dcp_to_torch_save`` nests it. The tensors are views of a mapping that
nobody reads or writes, so none of its pages is ever allocated.

What does not belong here: the bytes of the tensors (`tensors`, `gathering`).
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.format.writing.frame import Frame
from async_ckpt.snapshot.host_pool import aligned
from async_ckpt.snapshot.torch_format import Record, torch_records

__all__ = ["Values", "items_of_values", "lay_out"]

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has a name from Python 3.13 on


def items_of_values(metadata: Metadata) -> list[ReadItem]:
    """Return what has to be read for the values that are not tensors."""
    return [
        ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=MetadataIndex(name),
            dest_offsets=torch.Size((0,)),
            storage_index=MetadataIndex(name),
            storage_offsets=torch.Size((0,)),
            lengths=torch.Size((0,)),
        )
        for name, described in metadata.state_dict_metadata.items()
        if isinstance(described, BytesStorageMetadata)
    ]


class Values(LoadPlanner):
    """A planner that collects the values that are not tensors.

    Attributes:
        found: the values, by their names.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Unpickle a value. The caller has checked that this is safe."""
        self.found[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=False)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the items are known."""

    def create_local_plan(self) -> LoadPlan:
        """Return an empty plan."""
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return it unchanged."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return it unchanged."""
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Refuse: tensors are not read by a planner."""
        raise NotImplementedError

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing."""


def lay_out(metadata: Metadata, values: Mapping[str, Any], url: str) -> Frame:
    """Return the file without the bytes of its tensors; storage *n* belongs to the *n*-th tensor in *metadata*.

    Args:
        metadata: the parsed ``.metadata``.
        values: the values that are not tensors, by name.
        url: the location of the checkpoint, for messages.

    Raises:
        CorruptCheckpointError: ``.metadata`` nests the values in an impossible way.
    """
    tensors = {
        name: (described.size, described.properties.dtype)
        for name, described in metadata.state_dict_metadata.items()
        if isinstance(described, TensorStorageMetadata)
    }
    with torch.inference_mode(mode=False), torch.no_grad():
        stand_ins = _StandIns(tensors.values())
        leaves = {**values, **dict(zip(tensors, stand_ins, strict=True))}
        state = _nested({name: leaves[name] for name in metadata.state_dict_metadata}, metadata, url)
        wanted = torch_records(state)
    records: list[Record] = []
    for name, content in wanted:
        if isinstance(content, torch.UntypedStorage):
            number = stand_ins.find(content)
            # The others belong to tensors inside of values, which are in memory: to DCP, a tuple of tensors is a value.
            records.append((name, _bytes_of(content) if number is None else number))
        else:
            records.append((name, content))
    return Frame(records, stand_ins.sizes)


def _nested(leaves: Mapping[str, Any], metadata: Metadata, url: str) -> dict[str, Any]:
    paths: Mapping[str, Any] = metadata.planner_data or {}
    state: dict[str, Any] = {}
    for name, value in leaves.items():
        path = paths.get(name)
        if path is None:
            state[name] = value
            continue
        try:
            # A list has at most as many elements as there are values: each element is a value or contains one.
            if not path or any(isinstance(step, int) and not 0 <= step < len(leaves) for step in path[1:]):
                raise ValueError(f"there is no {path!r}")
            set_element(state, tuple(path), value)
        except Exception as error:  # of any kind, if a value is where a container should be
            raise CorruptCheckpointError(
                f"{url!r} is corrupt: its .metadata does not say where its item {name!r} belongs ({error}). "
                "Load an earlier checkpoint.",
                location=url,
                stage="read",
            ) from error
    return state


def _bytes_of(storage: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


class _StandIns:
    """Tensors with the right dtypes and sizes, but without memory."""

    def __init__(self, kinds: Iterable[tuple[torch.Size, torch.dtype]]) -> None:
        self._kinds = list(kinds)
        self.sizes = [size.numel() * dtype.itemsize for size, dtype in self._kinds]
        self._starts: list[int] = []
        total = 0
        for nbytes in self.sizes:
            self._starts.append(total)
            total += aligned(max(1, nbytes))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(1, total), flags=flags)
        self._address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for (size, dtype), nbytes, start in zip(self._kinds, self.sizes, self._starts, strict=True):
            if nbytes == 0:
                yield torch.empty(size, dtype=dtype, device="cpu")
            else:
                flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=start)
                yield flat.view(dtype).view(size)

    def find(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number of the tensor that a storage belongs to; None if it belongs to none of them."""
        offset = storage.data_ptr() - self._address
        if not storage.nbytes() or not 0 <= offset < len(self._memory):
            return None
        return bisect_right(self._starts, offset) - 1
