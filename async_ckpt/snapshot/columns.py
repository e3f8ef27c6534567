"""The plain tensors of a state, as columns: reading them in bulk takes a third of going from one to the next.

Guarantees: each tensor is described as it was at one instant, through an alias that nobody else has, whatever other
threads do meanwhile.

What does not belong here: which tensors are plain, and storages that are not (`extraction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from async_ckpt.snapshot.entries import Entry, TensorEntry
from async_ckpt.snapshot.sources import Sources, address_of, without_modes_if_any

__all__ = ["Columns", "Entries", "Reader"]

_Tensor: Any = torch.Tensor
_alias = _Tensor.data.__get__
_dtype = _Tensor.dtype.__get__
_requires_grad = _Tensor.requires_grad.__get__
_is_cpu = _Tensor.is_cpu.__get__
_identity = torch.UntypedStorage._cdata.__get__


class Columns(NamedTuple):
    """What there is to say of tensors, as one list for each attribute of `TensorEntry`; but *kinds* are their types."""

    storages: Sequence[int] = ()
    dtypes: Sequence[torch.dtype] = ()
    offsets: Sequence[int] = ()
    sizes: Sequence[tuple[int, ...]] = ()
    strides: Sequence[tuple[int, ...]] = ()
    requires_grad: Sequence[bool] = ()
    kinds: Sequence[type] = ()


class Entries(NamedTuple):
    """The entries that a skeleton refers to by number.

    Attributes:
        others: those that are in no column, by number.
        tensors: all others, in order.
    """

    others: Mapping[int, Entry]
    tensors: Columns

    def listed(self) -> list[Entry]:
        """Return all entries; costs a microsecond each, so call it in a worker."""
        *columns, kinds = self.tensors
        columns[3] = map(tuple, self.tensors.sizes)  # type: ignore[call-overload]
        are_parameters = [kind is not torch.Tensor for kind in kinds]
        tensors: map[Entry] = map(TensorEntry._make, zip(*columns, are_parameters, strict=True))
        if not self.others:
            return list(tensors)
        count = len(self.others) + len(kinds)
        return [self.others[number] if number in self.others else next(tensors) for number in range(count)]


class Reader:
    """Reads tensors, group by group.

    Attributes:
        dtypes: of the tensors that were read.
        storages: of these tensors, one for each.
        tensors: themselves.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.storages: list[torch.UntypedStorage] = []
        self._aliases: list[torch.Tensor] = []
        self._offsets: list[int] = []
        self._sizes: list[tuple[int, ...]] = []
        self._strides: list[tuple[int, ...]] = []
        self._requires_grad: list[bool] = []
        self._kinds: list[type] = []

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        """Read *tensors*."""
        with without_modes_if_any():
            aliases = list(map(_alias, tensors))
            self.tensors += tensors
            self._aliases += aliases
            self.dtypes += map(_dtype, aliases)
            self.storages += map(_Tensor.untyped_storage, aliases)
            self._offsets += map(_Tensor.storage_offset, aliases)
            self._sizes += map(_Tensor.size, aliases)
            self._strides += map(_Tensor.stride, aliases)
            self._requires_grad += map(_requires_grad, tensors)
            self._kinds += map(type, tensors)

    def columns(self, indices: Sequence[int]) -> Columns:
        """Return all that was read, given the numbers of the storages."""
        return Columns(
            indices,
            self.dtypes,
            self._offsets,
            self._sizes,
            self._strides,
            self._requires_grad,
            self._kinds,
        )

    def sources(self, dtypes: Sequence[torch.dtype]) -> tuple[Sources, list[int]] | None:
        """Return the storages in the order of their occurrence, and which of them each tensor has.

        Args:
            dtypes: of the tensors' storages, as torch saves them.

        Returns:
            ``None`` if they are not all in host memory of their own, and saved as one type.
        """
        with without_modes_if_any():
            return self._sources(dtypes) if all(map(_is_cpu, self._aliases)) else None

    def _sources(self, dtypes: Sequence[torch.dtype]) -> tuple[Sources, list[int]] | None:
        identities = list(map(_identity, self.storages))
        one_each = dict(zip(identities, range(len(identities)), strict=True))  # a tensor of each storage
        owners, aliases, indices = self.storages, self._aliases, list(range(len(identities)))
        if len(one_each) < len(identities):
            numbers = dict(zip(one_each, range(len(one_each)), strict=True))
            indices = list(map(numbers.__getitem__, identities))
            if len(set(zip(indices, dtypes, strict=True))) > len(one_each):
                return None
            owners = list(map(owners.__getitem__, one_each.values()))
            aliases = list(map(aliases.__getitem__, one_each.values()))
        sizes = list(map(torch.UntypedStorage.nbytes, owners))
        addresses = list(map(address_of, aliases))
        if 0 in sizes or 0 in addresses:
            return None
        skips = [0] * len(owners)
        if any(self._offsets):
            offsets, types = self._offsets, self.dtypes
            skips = [-offsets[tensor] * types[tensor].itemsize for tensor in one_each.values()]
            addresses = list(map(int.__add__, addresses, skips))
        if len(set(addresses)) < len(addresses):
            return None
        return Sources(owners=owners, sizes=sizes, aliases=aliases, skips=skips), indices
