"""Who writes which item of a sharded checkpoint, and where each item is in its file: torch's own planning, as values.

Guarantees: nothing here waits or communicates. The plan of a rank is made from the `Form` of its items; torch's
``DefaultSavePlanner`` makes the global plan from the plans of all ranks. So an item that several ranks have is written
once, and the work is spread evenly. A plan holds for all later saves of the same forms; only the lengths of pickled
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
from async_ckpt.sharded.writing.flatten import Form
from async_ckpt.system.garbage import collector_held_back

__all__ = ["OBJECT_SUFFIX", "VERSION", "GlobalPlan", "LocalPlan", "make_global_plan", "object_name"]

OBJECT_SUFFIX = ".distcp"
"""Of the names of the objects that hold the items."""

VERSION = "1.0.0"
"""Of torch's format."""

_PICKLED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """What one rank could write.

    Attributes:
        plan: in torch's words.
        lengths: of its items' files, in order; -1 for values that are pickled anew in each save.
    """

    plan: SavePlan
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, forms: Sequence[Form], mappings: Mapping[str, tuple[str | int, ...]]) -> LocalPlan:
        """Make the plan of a rank's items. Has torch make a template for each kind of tensor that is new."""
        return cls(
            plan=SavePlan([_write_item(form) for form in forms], planner_data=dict(mappings)),
            lengths=tuple(
                _PICKLED if form.dtype is None else template(form.dtype, form.sizes, form.stride).nbytes
                for form in forms
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
    """Who writes what.

    Attributes:
        work: for each rank, the numbers of its items that it writes, in the order of its object.
    """

    work: tuple[array[int], ...]
    _metadata: Metadata
    _lengths: tuple[tuple[int, ...], ...]
    _indices: tuple[tuple[MetadataIndex, ...], ...]
    _blobs: tuple[Mapping[int, int], ...]

    @collector_held_back()
    def metadata(self, save_id: str, location: str, sizes: Sequence[Sequence[int]]) -> Metadata:
        """Return the description of one checkpoint, to be written last.

        Args:
            save_id: of the save.
            location: where it is, for people to read.
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
    """Decide who writes what; takes tens of microseconds for each item of each rank.

    Args:
        plans: of all ranks, in their order.

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
    """Return the index among the pickled values, by item."""
    pickled = [number for number, length in enumerate(lengths) if length == _PICKLED]
    return {number: place for place, number in enumerate(pickled)}


def _write_item(form: Form) -> WriteItem:
    if form.whole is None or form.dtype is None:
        return WriteItem(index=MetadataIndex(form.name), type=WriteItemType.BYTE_IO)
    offsets, sizes = torch.Size(form.offsets), torch.Size(form.sizes)
    return WriteItem(
        index=MetadataIndex(form.name, offsets),
        type=WriteItemType.SHARD if form.is_part else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=form.dtype, requires_grad=form.requires_grad),
            size=torch.Size(form.whole),
        ),
    )
