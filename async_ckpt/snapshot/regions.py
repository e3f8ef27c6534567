"""The bytes of tensors alone, for a writer that knows by itself what they are.

Guarantees: what tensors have in common is copied once; of a storage that they use a part of, only that part is. Nothing
is copied before `Capture.stage`, but for a tensor whose elements do not lie together, or on a device that gives no
bytes.

What does not belong here: what the bytes mean (`sharded`), memory (`host_pool`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from async_ckpt.snapshot.capture import Capture
from async_ckpt.snapshot.contents import Nothing
from async_ckpt.snapshot.extraction import Extracted
from async_ckpt.snapshot.sources import bytes_of, without_modes_if_any

__all__ = ["Region", "as_dense", "capture_regions"]

_READABLE = frozenset({"cpu", "cuda", "meta"})
"""Devices whose storages give their bytes."""


class Region(NamedTuple):
    """Where the bytes of one tensor are: in which storage of the snapshot, from which byte on, and how many."""

    storage: int
    start: int
    nbytes: int


def as_dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor*, or a copy of it, such that its elements lie together; gradients and subclasses left behind."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type not in _READABLE:
        tensor = tensor.cpu()
    return tensor if tensor.is_contiguous() or _is_permuted(tensor) else tensor.contiguous()


def capture_regions(tensors: Sequence[torch.Tensor], *, overhead: int) -> tuple[Capture, list[Region]]:
    """Take stock of *tensors*, made by `as_dense`, without copying them.

    Args:
        tensors: on any device.
        overhead: host bytes that the save holds beside them.

    Returns:
        The capture, to be staged before the tensors change, and where each tensor's bytes will be.
    """
    ranges: list[tuple[int, int, int, int]] = []  # storage, start, stop, number of the tensor
    owners: dict[int, torch.UntypedStorage] = {}
    for number, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        identity = storage._cdata
        owners.setdefault(identity, storage)
        start = int(tensor.storage_offset()) * tensor.itemsize
        ranges.append((identity, start, start + tensor.nbytes, number))
    with without_modes_if_any():
        return _extract(tensors, ranges, owners, overhead)


def _extract(
    tensors: Sequence[torch.Tensor],
    ranges: list[tuple[int, int, int, int]],
    owners: dict[int, torch.UntypedStorage],
    overhead: int,
) -> tuple[Capture, list[Region]]:
    order = {
        identity: place for place, identity in enumerate(owners)
    }  # as the state has them, not as memory does
    ranges.sort(key=lambda each: (order[each[0]], each[1]))
    extracted = Extracted()
    sources = extracted.sources
    regions: list[Region | None] = [None] * len(ranges)
    at = 0
    while at < len(ranges):
        identity, start, stop, first = ranges[at]
        is_empty = start == stop  # then its address is not to be had
        last = at
        while last < len(ranges) and ranges[last][0] == identity and ranges[last][1] <= stop:
            stop = max(stop, ranges[last][2])
            last += 1
        for _, begin, end, number in ranges[at:last]:
            regions[number] = Region(len(sources.sizes), begin - start, end - begin)
        owner = owners[identity]
        sources.owners.append(owner)
        sources.owner_sizes.append(owner.nbytes())
        sources.begins.append(start)
        sources.sizes.append(stop - start)
        sources.aliases.append(bytes_of(owner) if is_empty else tensors[first].data)
        sources.skips.append(start if is_empty else 0)
        extracted.locations.append("cpu")
        at = last
    found = [region for region in regions if region is not None]
    return Capture(Nothing(), extracted, overhead), found


def _is_permuted(tensor: torch.Tensor) -> bool:
    """Return whether the elements lie together, in an order of dimensions other than the usual one."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
