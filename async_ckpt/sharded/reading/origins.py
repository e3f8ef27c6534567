"""The checkpoint that a state is read from: a directory that DCP wrote, or a plain file of ``torch.save``.

Guarantees: an impossible description is refused before any tensor is read.

What does not belong here: reading the bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from async_ckpt.errors import CorruptCheckpointError, StoreError
from async_ckpt.format.reading.direct import expected_start
from async_ckpt.format.reading.reader import Skeleton
from async_ckpt.sharded.reading.coverage import fault_of
from async_ckpt.sharded.reading.extents import Item, Record
from async_ckpt.sharded.reading.fetching import Segment
from async_ckpt.sharded.reading.items import corrupt_item

__all__ = ["Directory", "PlainFile"]


class Directory:
    """A sharded checkpoint.

    Args:
        metadata: its parsed ``.metadata``.
        url: its location, for messages.
    """

    def __init__(self, metadata: Metadata, url: str) -> None:
        self.metadata = metadata
        self._url = url
        self._checked: set[str] = set()

    def extent(self, item: ReadItem) -> Item:
        """Return the place of the tensor that *item* is a part of."""
        index = item.storage_index
        self.check_chunks(index.fqn)
        info = self._info(index)
        tensor = self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        sizes, dtype = tuple(self._chunk(tensor, index).sizes), tensor.properties.dtype
        if math.prod(sizes) * dtype.itemsize > info.length:
            raise self._corrupt(index.fqn, f"it has {info.length} bytes, too few for {sizes} of {dtype}")
        return Item(
            path=info.relative_path,
            sizes=sizes,
            dtype=dtype,
            start=info.offset,
            stop=info.offset + info.length,
        )

    def check_chunks(self, name: str) -> None:
        """Raise CorruptCheckpointError if the chunks of a tensor do not make it up, since gaps would not be filled."""
        if name in self._checked:
            return
        self._checked.add(name)
        described = self.metadata.state_dict_metadata[name]
        assert isinstance(described, TensorStorageMetadata)
        fault = fault_of(described.size, ((each.offsets, each.sizes) for each in described.chunks))
        if fault is not None:
            raise self._corrupt(name, fault)

    def value(self, item: ReadItem) -> Segment:
        """Return the place of a pickled value."""
        info = self._info(item.storage_index)
        return Segment(path=info.relative_path, start=info.offset, nbytes=info.length)

    def _info(self, index: MetadataIndex) -> Any:
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise self._corrupt(index.fqn, ".metadata does not say where it is")
        transforms = getattr(info, "transform_descriptors", None)  # not before torch 2.7
        if transforms:
            how = ", ".join(transforms)
            raise StoreError(
                f"cannot read {self._url!r}: its items were written with extensions of torch's writer ({how}). "
                "Load it with torch.distributed.checkpoint and the same extensions, and save it without them.",
                location=self._url,
                stage="read",
            )
        return info

    def _chunk(self, tensor: TensorStorageMetadata, index: MetadataIndex) -> ChunkStorageMetadata:
        chunks, hint = tensor.chunks, index.index
        if hint is not None and hint < len(chunks) and chunks[hint].offsets == index.offset:
            return chunks[hint]
        for chunk in chunks:
            if chunk.offsets == index.offset:
                return chunk
        raise self._corrupt(index.fqn, ".metadata does not say how large it is")

    def _corrupt(self, name: str, reason: str) -> CorruptCheckpointError:
        return corrupt_item(self._url, name, reason)


class PlainFile:
    """A state in one file; each of its tensors counts as one chunk.

    Args:
        skeleton: the state without the bytes of its tensors.
        url: its location, for messages.
    """

    def __init__(self, skeleton: Skeleton, url: str) -> None:
        self._skeleton = skeleton
        self._url = url
        if not isinstance(skeleton.state, dict):
            raise self._refusal(f"it contains a {type(skeleton.state).__name__}, not a mapping")
        self._flat, paths = flatten_state_dict(skeleton.state)
        self.metadata = Metadata({name: _described(value) for name, value in self._flat.items()}, paths)

    def extent(self, item: ReadItem) -> Record:
        """Return the place of the tensor that *item* is a part of."""
        name = item.storage_index.fqn
        tensor = self._flat[name]
        kind = type(tensor)
        simple = kind in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not simple or tensor.is_quantized:
            raise self._refusal(
                f"its {name!r} is not a plain dense tensor ({kind.__name__}, {tensor.layout})"
            )
        entry = self._skeleton.records[tensor.untyped_storage()._cdata]
        return Record(
            path="",
            sizes=tuple(tensor.shape),
            dtype=tensor.dtype,
            entry=entry,
            offset=tensor.storage_offset(),
            strides=tensor.stride(),
            head_stop=expected_start(entry, self._skeleton.alignment),
            is_conj=tensor.is_conj(),
            is_neg=tensor.is_neg(),
            is_scattered=not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg(),
        )

    def value(self, item: ReadItem) -> bytes:
        """Return a pickled value that is not a tensor."""
        name = item.storage_index.fqn
        try:
            pickled = io.BytesIO()
            _WithoutTensors(pickled).dump(self._flat[name])
        except _HasTensor:
            raise self._refusal(f"its value {name!r} contains tensors") from None
        stream = io.BytesIO()
        torch.save(self._flat[name], stream)
        return stream.getvalue()

    def _refusal(self, reason: str) -> StoreError:
        return StoreError(
            f"cannot read {self._url!r} into a sharded state: {reason}. Load it with async_ckpt.load.",
            location=self._url,
            stage="read",
        )


def _described(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if not isinstance(value, torch.Tensor):
        return BytesStorageMetadata()
    zeros = torch.Size([0] * value.dim())
    chunk = ChunkStorageMetadata(offsets=zeros, sizes=value.shape)
    return TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, [chunk])


class _HasTensor(Exception):
    pass


class _WithoutTensors(pickle.Pickler):
    def persistent_id(self, value: Any) -> None:
        if isinstance(value, (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)):
            raise _HasTensor
