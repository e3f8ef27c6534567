"""Flattens the state of one rank into items: tensors, which may be parts of larger ones, and values that are pickled.

Guarantees: everything here runs on the caller's thread, within ``save_sharded``, without any communication (T1). The
result shares nothing with the state except the memory of its tensors. A value that the format does not support is
refused here; the error names it.

The names come from torch's own ``flatten_state_dict``, so a checkpoint has the same keys as one by DCP.

What does not belong here: which rank writes what (`plan`), the bytes of a file (`archive`, `shard`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.stateful import Stateful

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.snapshot.regions import as_dense

__all__ = ["Flattened", "ItemSpec", "flatten"]

# Before torch 2.5, it is in another module.
DTensor: Any = (
    getattr(import_module("torch.distributed.tensor"), "DTensor", None)
    or import_module("torch.distributed._tensor").DTensor
)

_ATOMS = frozenset({int, float, str, bool, type(None), bytes, torch.dtype})
_KEPT_BLOBS = 4096
_KEPT_BLOB_BYTES = 64 << 10


class ItemSpec(NamedTuple):
    """Describes one item of a rank, apart from its bytes; it is the same in the next save unless the model changes.

    Attributes:
        name: the path to it in the state, joined by dots.
        global_shape: the shape of the whole tensor; ``None`` for a value that is pickled.
        offsets: where this rank's part begins in the whole tensor.
        sizes: the shape of this rank's part.
        stride: of its elements in memory.
        dtype: of its elements.
        requires_grad: of the tensor; only recorded in ``.metadata``.
        is_part: whether other ranks may have other parts of it; otherwise each rank has the same tensor.
    """

    name: str
    global_shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    requires_grad: bool = False
    is_part: bool = False


@dataclass(slots=True, kw_only=True)
class Flattened:
    """A flattened state.

    Attributes:
        specs: of all items, in the order of the state.
        tensors: the items that are tensors, in that order.
        blobs: the other items as files of ``torch.save``, in that order.
        mappings: by name, the path to the item in the nested state.
    """

    specs: list[ItemSpec] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)
    mappings: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


def flatten(state: Mapping[str, Any], extras: Mapping[str, Any] | None = None) -> Flattened:
    """Flatten *state*.

    Args:
        state: nested mappings and lists, as ``torch.distributed.checkpoint.save`` takes them; of an object with
            ``state_dict``, its result is saved.
        extras: more values by name; each becomes one pickled item.

    Returns:
        Its items; their tensors share the state's memory, so they must be captured before it changes.

    Raises:
        UnpicklableStateError: something in it cannot be saved; the error names it.
    """
    if not isinstance(state, Mapping):
        raise UnpicklableStateError(
            f"cannot save a {type(state).__name__} as a sharded checkpoint; pass a mapping, such as a dict",
            where="state",
        )
    stated = {
        key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()
    }
    flat, mappings = flatten_state_dict(stated)
    if any(isinstance(value, ShardedTensor) for value in flat.values()):
        flat = _flatten_sharded_tensors(flat)
    found = Flattened(mappings=mappings)
    with torch.no_grad():
        for name, value in flat.items():
            if isinstance(value, DTensor):
                _add_dtensor(found, name, value)
            elif isinstance(value, ShardedTensor):
                _add_shards(found, name, value)
            elif isinstance(value, torch.Tensor):
                global_shape = tuple(value.shape)
                _add_tensor(
                    found, name, value, global_shape, (0,) * len(global_shape), global_shape, is_part=False
                )
            else:
                found.specs.append(ItemSpec(name))
                found.blobs.append(_blob(name, value))
    for name, value in (extras or {}).items():
        found.specs.append(ItemSpec(name))
        found.blobs.append(_blob(name, value))
        found.mappings = {**found.mappings, name: (name,)}
    return found


def _add_dtensor(found: Flattened, name: str, tensor: Any) -> None:
    mesh, placements, global_shape = tensor.device_mesh, tensor.placements, tensor.shape
    key = (id(mesh), placements, global_shape)
    known = _chunks.get(key)
    if known is None:
        if len(_chunks) >= _KEPT_BLOBS:
            _chunks.clear()
        known = _chunks[key] = mesh, _chunk_of(name, tensor)  # keep the mesh alive: the key has its id
    chunk = known[1]
    if chunk is None:  # this rank is not in its mesh
        return
    local = tensor.to_local()
    if hasattr(local, "wait"):  # the result of a collective operation that may still be in progress
        local = local.wait()
    _add_tensor(found, name, local, tuple(global_shape), *chunk, is_part=True)


_Chunk = tuple[tuple[int, ...], tuple[int, ...]]
_chunks: dict[Any, tuple[Any, _Chunk | None]] = {}
"""By mesh, placements and size: where this rank's part of a DTensor begins, and its size."""


def _chunk_of(name: str, tensor: Any) -> _Chunk | None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnpicklableStateError(
            f"cannot save {name}: its placement is {tensor.placements}, so the ranks hold values that are yet to be "
            "summed; redistribute it to Shard or Replicate first",
            where=name,
        )
    if tensor.device_mesh.get_coordinate() is None:
        return None
    if not hasattr(tensor, "__create_chunk_list__"):  # torch 2.4, where a rank holds one part of a DTensor
        utils = import_module("torch.distributed._tensor._utils")
        sizes, offsets = utils.compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return tuple(offsets), tuple(sizes)
    chunks = tensor.__create_chunk_list__()
    if len(chunks) != 1:
        raise UnpicklableStateError(
            f"cannot save {name}: a rank holds {len(chunks)} parts of it by {tensor.placements}; "
            "redistribute it to Shard first",
            where=name,
        )
    return tuple(chunks[0].offsets), tuple(chunks[0].sizes)


def _add_shards(found: Flattened, name: str, tensor: ShardedTensor) -> None:
    global_shape = tuple(tensor.metadata().size)
    for shard in tensor.local_shards():
        described = shard.metadata
        offsets, sizes = tuple(described.shard_offsets), tuple(described.shard_sizes)
        _add_tensor(found, name, shard.tensor, global_shape, offsets, sizes, is_part=True)


def _add_tensor(
    found: Flattened,
    name: str,
    tensor: torch.Tensor,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    *,
    is_part: bool,
) -> None:
    plain = tensor.detach()
    if (
        type(plain) is not torch.Tensor
        or plain.layout is not torch.strided
        or plain.is_quantized
        or plain.is_meta
    ):
        raise UnpicklableStateError(
            f"cannot save {name}: the format of sharded checkpoints does not support a {_described(plain)}; "
            "save its components, each as a dense tensor",
            where=name,
        )
    if tuple(plain.shape) != sizes:
        raise UnpicklableStateError(
            f"cannot save {name}: this rank's part has the shape {tuple(plain.shape)}, but according to the tensor's "
            f"placement it should have {sizes}; make the DTensor with its true shape and placements",
            where=name,
        )
    dense = as_dense(plain)
    found.tensors.append(dense)
    found.specs.append(
        ItemSpec(
            name, global_shape, offsets, sizes, dense.stride(), dense.dtype, tensor.requires_grad, is_part
        )
    )


def _described(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "tensor on the meta device, which has no data"
    kind = type(tensor)
    name = "tensor" if kind is torch.Tensor else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} of layout {tensor.layout}, dtype {tensor.dtype}"


def _blob(name: str, value: Any) -> bytes:
    """Return *value* as a file of ``torch.save``; for immutable values, such as numbers, it is cached."""
    key = _as_key(value)
    known = None if key is None else _blobs.get(key)
    if known is None:
        file = io.BytesIO()
        try:
            torch.save(value, file)
        except Exception as error:  # whatever a __reduce__ raises
            reason = str(error) or type(error).__name__
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise UnpicklableStateError(f"cannot save {name} ({kind}): {reason}", where=name) from error
        known = file.getvalue()
        if key is not None and len(known) <= _KEPT_BLOB_BYTES:
            if len(_blobs) >= _KEPT_BLOBS:
                _blobs.clear()
            _blobs[key] = known
    return known


_blobs: dict[Any, bytes] = {}


def _as_key(value: Any) -> Any:
    """Return a key for *value* that differs for values of different types; ``None`` if *value* may change."""
    kind = type(value)
    if kind is float:
        return float, value.hex()  # 0.0 and -0.0 differ, and a NaN equals itself
    if kind in _ATOMS:
        return kind, value
    if kind in (tuple, list):
        keys = tuple(map(_as_key, value))
        return None if None in keys else (kind, keys)
    return None
