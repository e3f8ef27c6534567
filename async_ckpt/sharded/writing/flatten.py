"""The state of one rank, taken apart: tensors that are parts of larger ones, and values that are pickled.

Guarantees: everything here runs on the caller's thread, within ``save_sharded``, without any communication (T1). The
result shares nothing with the state but the memory of its tensors. What cannot be represented is refused here, by name.

The names are those of torch's own ``flatten_state_dict``, so a checkpoint has the keys that DCP would give it.

What does not belong here: who writes what (`plan`), the bytes of a file (`archive`, `shard`).
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

__all__ = ["Flattened", "Form", "flatten"]

# Before torch 2.5, in a place of its own.
DTensor: Any = (
    getattr(import_module("torch.distributed.tensor"), "DTensor", None)
    or import_module("torch.distributed._tensor").DTensor
)

_ATOMS = frozenset({int, float, str, bool, type(None), bytes, torch.dtype})
_KEPT_BLOBS = 4096
_KEPT_BLOB_BYTES = 64 << 10


class Form(NamedTuple):
    """What one item of a rank is, all but its bytes; equal from save to save where nothing was changed.

    Attributes:
        name: the way to it in the state, joined by dots.
        whole: the size of the whole tensor; ``None`` for a value that is pickled.
        offsets: where in the whole this rank's part begins.
        sizes: of this rank's part.
        stride: of its elements in memory.
        dtype: of its elements.
        requires_grad: of the tensor, for its description alone.
        is_part: whether other ranks may have other parts of it; else each rank has the same.
    """

    name: str
    whole: tuple[int, ...] | None = None
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    requires_grad: bool = False
    is_part: bool = False


@dataclass(slots=True, kw_only=True)
class Flattened:
    """A state taken apart.

    Attributes:
        forms: every item, in the state's order.
        tensors: the bytes of those that are tensors, in that order.
        blobs: the others as files of ``torch.save``, in that order.
        mappings: by name, the way to it in the nested state.
    """

    forms: list[Form] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)
    mappings: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)


def flatten(state: Mapping[str, Any], extras: Mapping[str, Any] | None = None) -> Flattened:
    """Take *state* apart.

    Args:
        state: nested mappings and lists, as ``torch.distributed.checkpoint.save`` takes them; values with
            ``state_dict`` are asked for it.
        extras: more values by name, each to be one item, pickled as it is.

    Returns:
        Its items; their tensors are the state's own memory, to be captured before it changes.

    Raises:
        UnpicklableStateError: something in it cannot be saved; the error names it.
    """
    if not isinstance(state, Mapping):
        raise UnpicklableStateError(
            f"a sharded checkpoint is made of a mapping, not of a {type(state).__name__}", where="state"
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
                whole = tuple(value.shape)
                _add_tensor(found, name, value, whole, (0,) * len(whole), whole, is_part=False)
            else:
                found.forms.append(Form(name))
                found.blobs.append(_blob(name, value))
    for name, value in (extras or {}).items():
        found.forms.append(Form(name))
        found.blobs.append(_blob(name, value))
        found.mappings = {**found.mappings, name: (name,)}
    return found


def _add_dtensor(found: Flattened, name: str, tensor: Any) -> None:
    mesh, placements, whole = tensor.device_mesh, tensor.placements, tensor.shape
    key = (id(mesh), placements, whole)
    known = _boxes.get(key)
    if known is None:
        if len(_boxes) >= _KEPT_BLOBS:
            _boxes.clear()
        known = _boxes[key] = mesh, _box(name, tensor)  # with the mesh, whose identity it goes by
    box = known[1]
    if box is None:  # this rank has no part in its mesh
        return
    local = tensor.to_local()
    if hasattr(local, "wait"):  # of a collective that may not have ended
        local = local.wait()
    _add_tensor(found, name, local, tuple(whole), *box, is_part=True)


_Box = tuple[tuple[int, ...], tuple[int, ...]]
_boxes: dict[Any, tuple[Any, _Box | None]] = {}
"""By mesh, placements and size: where this rank's part of a DTensor begins, and its size."""


def _box(name: str, tensor: Any) -> _Box | None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnpicklableStateError(
            f"cannot save {name}: its placement is {tensor.placements}, so the ranks hold summands that were not "
            "added up yet; redistribute it to Shard or Replicate first",
            where=name,
        )
    if tensor.device_mesh.get_coordinate() is None:
        return None
    if not hasattr(tensor, "__create_chunk_list__"):  # torch 2.4, where nothing holds more than one
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
    whole = tuple(tensor.metadata().size)
    for shard in tensor.local_shards():
        described = shard.metadata
        offsets, sizes = tuple(described.shard_offsets), tuple(described.shard_sizes)
        _add_tensor(found, name, shard.tensor, whole, offsets, sizes, is_part=True)


def _add_tensor(
    found: Flattened,
    name: str,
    tensor: torch.Tensor,
    whole: tuple[int, ...],
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
            f"cannot save {name}: a {_described(plain)} is not in the format of sharded checkpoints; "
            "save what it is made of, each as a dense tensor",
            where=name,
        )
    if tuple(plain.shape) != sizes:
        raise UnpicklableStateError(
            f"cannot save {name}: this rank holds a part of size {tuple(plain.shape)} where the placement of the "
            f"whole says {sizes}",
            where=name,
        )
    dense = as_dense(plain)
    found.tensors.append(dense)
    found.forms.append(
        Form(name, whole, offsets, sizes, dense.stride(), dense.dtype, tensor.requires_grad, is_part)
    )


def _described(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "tensor on the meta device, which has no bytes,"
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
    """Return what stands for *value* where that consists of builtins that cannot change, and tells types apart."""
    kind = type(value)
    if kind is float:
        return float, value.hex()  # tells zeros apart, and a NaN is itself
    if kind in _ATOMS:
        return kind, value
    if kind in (tuple, list):
        keys = tuple(map(_as_key, value))
        return None if None in keys else (kind, keys)
    return None
