"""A stager: it copies the state for ``torch.distributed.checkpoint.async_save``, if a program keeps calling that.

Guarantees: each copy has memory of its own, so no later copy overwrites one that is not written yet (S1). torch's
``DefaultStager`` does overwrite it if it is kept from save to save, as torch's documentation advises. Tensors that
share memory share it in the copy.

What does not belong here: ``async_ckpt.dcp.async_save``, which needs no stager.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor  # type: ignore[attr-defined]
from torch.distributed.checkpoint.staging import AsyncStager

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.sharded.writing.flatten import DTensor
from async_ckpt.snapshot.regions import as_dense

__all__ = ["Stager"]


class Stager(AsyncStager):
    """Copies a state into host memory before ``async_save`` returns; may be kept from save to save."""

    _synchronize_after_execute = False

    def stage(self, state_dict: Any, **kwargs: Any) -> Any:
        """Return a copy of *state_dict* that training does not change.

        Raises:
            UnpicklableStateError: it contains a ``ShardedTensor``, which torch's planners accept only on its own
                device.
        """
        copies = _Copies()
        with torch.no_grad():
            staged = copies.of(state_dict, "state")
        if copies.is_under_way:
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: when `stage` returns, the copy is complete."""

    def close(self) -> None:
        """Do nothing: the memory belongs to the copies that `stage` has returned."""


class _Copies:
    """The copies of one call."""

    def __init__(self) -> None:
        self._known: dict[Any, torch.Tensor] = {}
        self._kept: list[Any] = []  # the keys above are their identities
        self.is_under_way = False

    def of(self, value: Any, where: str) -> Any:
        """Return a copy of *value*."""
        if isinstance(value, ShardedTensor):
            raise UnpicklableStateError(
                f"cannot stage {where}: a ShardedTensor is refused by torch on any device but its own. "
                "Save it by async_ckpt.dcp.async_save, which takes it",
                where=where,
            )
        if isinstance(value, DTensor):
            return DTensor(self._tensor(value.to_local()), value._spec, requires_grad=False)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return {key: self.of(each, f"{where}[{key!r}]") for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.of(each, f"{where}[{number}]") for number, each in enumerate(value))
        return copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if hasattr(tensor, "wait"):  # of a collective that may not have ended
            tensor = tensor.wait()
        plain = tensor.detach()
        if type(plain) is not torch.Tensor or plain.layout is not torch.strided:
            return plain.cpu().clone()
        key = (
            plain.untyped_storage()._cdata,
            plain.dtype,
            plain.storage_offset(),
            plain.shape,
            plain.stride(),
        )
        known = self._known.get(key)
        if known is None:
            is_far = plain.device.type == "cuda"
            known = torch.empty_like(as_dense(plain), device="cpu", pin_memory=is_far)
            known.copy_(plain, non_blocking=is_far)
            self.is_under_way |= is_far
            self._known[key] = known
            self._kept.append(plain)
        return known
