"""Plans which rank writes which item of a sharded checkpoint, and where each item is in its file, by torch's planner.

Guarantees: nothing here waits or communicates. The plan of a rank is made from the `ItemSpec` of its items. torch's
``DefaultSavePlanner`` makes the global plan from the plans of all ranks, so an item that several ranks have is written
once, and the work is spread evenly. A plan holds for all later saves of the same items; only the lengths of pickled
values change.

Only this module and `manifest` know torch's format.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from async_ckpt.sharded.manifest import known_to
from async_ckpt.sharded.writing.archive import template
from async_ckpt.sharded.writing.flatten import ItemSpec
from async_ckpt.system.garbage import collector_held_back

__all__ = ["OBJECT_SUFFIX", "VERSION", "GlobalPlan", "LocalPlan", "make_global_plan", "object_name"]

OBJECT_SUFFIX = ".distcp"
"""The suffix of the names of the objects that contain the items."""

VERSION = "1.0.0"
"""The version of torch's format."""

_PICKLED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """The items that one rank could write.

    Attributes:
        plan: the items in torch's form.
        lengths: the lengths of the items' files, in order; -1 for values, which are pickled anew in each save.
    """

    plan: SavePlan
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, specs: Sequence[ItemSpec], mappings: Mapping[str, tuple[str | int, ...]]) -> LocalPlan:
        """Make the plan of a rank's items, and a template for each new kind of tensor."""
        return cls(
            plan=SavePlan([_write_item(spec) for spec in specs], planner_data=dict(mappings)),
            lengths=tuple(
                _PICKLED if spec.dtype is None else template(spec.dtype, spec.sizes, spec.stride).nbytes
                for spec in specs
            ),
        )

    @collector_held_back()
    def to_bytes(self) -> bytes:
        """Encode the plan."""
        return pickle.dumps((self.plan, self.lengths))

    @classmethod
    def from_bytes(cls, sent: bytes) -> LocalPlan:
        """Decode a plan that another rank of the same program has sent."""
        plan, lengths = pickle.loads(sent)
        return cls(plan=plan, lengths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalPlan:
    """Which rank writes which items.

    Attributes:
        work: for each rank, the numbers of the items that it writes, in the order in which its object has them.
    """

    work: tuple[array[int], ...]
    _metadata: Metadata
    _lengths: tuple[tuple[int, ...], ...]
    _indices: tuple[tuple[MetadataIndex, ...], ...]
    _blobs: tuple[Mapping[int, int], ...]

    @collector_held_back()
    def metadata(self, save_id: str, location: str, sizes: Sequence[Sequence[int]]) -> Metadata:
        """Return the content of the ``.metadata`` of one checkpoint.

        Args:
            save_id: of the save.
            location: of the checkpoint, as information for people.
            sizes: for each rank, the lengths of its pickled values in this save.
        """
        stored: dict[MetadataIndex, _StorageInfo] = {}
        for rank, numbers in enumerate(self.work):
            name, at = object_name(rank, save_id), 0
            for number, index in zip(numbers, self._indices[rank], strict=True):
                length = self._lengths[rank][number]
                if length == _PICKLED:
                    length = sizes[rank][self._blobs[rank][number]]
                stored[index] = _StorageInfo(name, at, length)
                at += length
        about = StorageMeta(checkpoint_id=location, save_id=save_id)
        new = {"storage_data": stored, "storage_meta": about, "version": VERSION}
        return replace(self._metadata, **known_to(Metadata, new))


def make_global_plan(plans: Sequence[LocalPlan]) -> GlobalPlan:
    """Decide which rank writes which items; takes tens of microseconds for each item of each rank.

    Args:
        plans: of all ranks, in the order of the ranks.

    Raises:
        ValueError: the parts of a tensor overlap, or do not make up the whole.
    """
    numbered = [{item.index: number for number, item in enumerate(local.plan.items)} for local in plans]
    decided, metadata = DefaultSavePlanner().create_global_plan([local.plan for local in plans])
    return GlobalPlan(
        work=tuple(
            array("I", [numbers[item.index] for item in plan.items])
            for plan, numbers in zip(decided, numbered, strict=True)
        ),
        _metadata=metadata,
        _lengths=tuple(local.lengths for local in plans),
        _indices=tuple(tuple(item.index for item in plan.items) for plan in decided),
        _blobs=tuple(_pickled_numbers(local.lengths) for local in plans),
    )


def object_name(rank: int, save_id: str) -> str:
    """Return the name of the object that a rank writes."""
    return f"__{rank}_0.{save_id}{OBJECT_SUFFIX}"


def _pickled_numbers(lengths: Sequence[int]) -> dict[int, int]:
    """Return, by the number of an item, its index among the pickled values."""
    pickled = [number for number, length in enumerate(lengths) if length == _PICKLED]
    return {number: position for position, number in enumerate(pickled)}


def _write_item(spec: ItemSpec) -> WriteItem:
    if spec.global_shape is None or spec.dtype is None:
        return WriteItem(index=MetadataIndex(spec.name), type=WriteItemType.BYTE_IO)
    offsets, sizes = torch.Size(spec.offsets), torch.Size(spec.sizes)
    return WriteItem(
        index=MetadataIndex(spec.name, offsets),
        type=WriteItemType.SHARD if spec.is_part else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=spec.dtype, requires_grad=spec.requires_grad),
            size=torch.Size(spec.global_shape),
        ),
    )
