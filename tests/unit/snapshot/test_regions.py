"""The bytes of tensors alone, taken over parts of their storages."""

from __future__ import annotations

import torch

from async_ckpt.snapshot import HostBuffer
from async_ckpt.snapshot.regions import Region, capture_regions


def test_parts_of_storages_are_copied_from_where_they_begin() -> None:
    """Overlapping, separate and empty parts of one storage, large and small: each region has its tensor's bytes."""
    small, large = torch.arange(100.0), torch.arange(90_000.0)
    tensors = [
        small[20:30],
        small[5:5],
        small[25:40],
        small[60:70],
        large[70_000:70_000],
        large[70_000:],
        large[:60_000],
        large[60_000:60_000],
        torch.empty(0),
    ]
    captured, regions = capture_regions(tensors, overhead=0)
    expected = [tensor.numpy().tobytes() for tensor in tensors]
    for tensor in tensors:
        tensor.data = torch.zeros(3)  # not what is looked at
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    found = [_bytes(snapshot.view(region.storage), region) for region in regions]
    assert found == expected
    assert len(snapshot.storages) == 6  # for some of them overlap, or touch


def _bytes(storage: memoryview, region: Region) -> bytes:
    return bytes(storage[region.start : region.start + region.nbytes])
